/* Tile products, rows and reductions of the CPU backend, compiled once into the runtime library. */

#include "prelude.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__clang__)
INLINE vf fma_vf(vf a, vf b, vf c) { return __builtin_elementwise_fma(a, b, c); }
INLINE vf4 fma_vf4(vf4 a, vf4 b, vf4 c) { return __builtin_elementwise_fma(a, b, c); }
INLINE vd fma_vd(vd a, vd b, vd c) { return __builtin_elementwise_fma(a, b, c); }
#elif defined(__AVX512F__)
INLINE vf fma_vf(vf a, vf b, vf c) { return __builtin_ia32_vfmaddps512_mask(a, b, c, (uint16_t)-1, 4); }
INLINE vd fma_vd(vd a, vd b, vd c) { return __builtin_ia32_vfmaddpd512_mask(a, b, c, (uint8_t)-1, 4); }
INLINE vf4 fma_vf4(vf4 a, vf4 b, vf4 c) { return __builtin_ia32_vfmaddps(a, b, c); }
#elif defined(__AVX__) && defined(__FMA__)
INLINE vf fma_vf(vf a, vf b, vf c) { return __builtin_ia32_vfmaddps256(a, b, c); }
INLINE vd fma_vd(vd a, vd b, vd c) { return __builtin_ia32_vfmaddpd256(a, b, c); }
INLINE vf4 fma_vf4(vf4 a, vf4 b, vf4 c) { return __builtin_ia32_vfmaddps(a, b, c); }
#else
#define DEFINE_FMA(V, F)                                                                                          \
    INLINE V fma_##V(V a, V b, V c) {                                                                             \
        for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); i++) c[i] = F(a[i], b[i], c[i]);                       \
        return c;                                                                                                 \
    }
DEFINE_FMA(vf, __builtin_fmaf)
DEFINE_FMA(vf4, __builtin_fmaf)
DEFINE_FMA(vd, __builtin_fma)
#endif
INLINE vi fma_vi(vi a, vi b, vi c) { return a * b + c; }

/* C[M x N] (+)= A[M x K] B[K x N], row-major, contiguous. Each element is one chain, in the order of k,

       c = fma(a[i][k], b[k][j], c)

   whatever the tiling, so the bits do not depend on the machine's vector length. fp16 and bf16 products are exact in
   fp32, so fused and unfused agree there. `zero` starts from 0 instead of from C.

   Registers: 2 x 4 vectors of accumulators where there are 16 vector registers, since a broadcast of A costs more
   than a load of B; 4 x 4 where there are 32. */
#if defined(__AVX512F__) || defined(__aarch64__)
enum { WIDE_ROWS = 4 };
#else
enum { WIDE_ROWS = 2 };
#endif

#define DOT_PANEL(T, V, FMAV, ROWS, COLS)                                                                         \
    {                                                                                                             \
        V c[ROWS][COLS];                                                                                          \
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int s = 0; s < COLS; s++) c[r][s] =                     \
            zero ? (V){0} : *(const V *)(C + (i + r) * N + j + s * L);                                            \
        _Pragma("GCC unroll 2") for (long k = 0; k < K; k++) {                                                    \
            V b[COLS];                                                                                            \
            UNROLL for (int s = 0; s < COLS; s++) b[s] = *(const V *)(B + k * N + j + s * L);                     \
            UNROLL for (int r = 0; r < ROWS; r++) {                                                               \
                V a = A[(i + r) * K + k] - (V){0}; /* x - 0 is x, -0 included */                                  \
                UNROLL for (int s = 0; s < COLS; s++) c[r][s] = FMAV(a, b[s], c[r][s]);                           \
            }                                                                                                     \
        }                                                                                                         \
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int s = 0; s < COLS; s++)                               \
            *(V *)(C + (i + r) * N + j + s * L) = c[r][s];                                                        \
    }
#define DOT_COLUMNS(T, V, FMAV, ROWS, COLS)                                                                       \
    {                                                                                                             \
        enum { L = sizeof(V) / sizeof(T) };                                                                       \
        for (; j + COLS * L <= N; j += COLS * L) {                                                                \
            long i = 0;                                                                                           \
            for (; i + ROWS <= M; i += ROWS) DOT_PANEL(T, V, FMAV, ROWS, COLS)                                    \
            for (; i < M; i++) DOT_PANEL(T, V, FMAV, 1, COLS)                                                     \
        }                                                                                                         \
    }
#define DEFINE_DOT(NAME, T, V, FMAV, V1, FMA1, TAIL)                                                              \
    EXPORT void NAME(const T *A, const T *B, T *C, const long M, const long N, const long K, const int zero) {    \
        long j = 0;                                                                                               \
        DOT_COLUMNS(T, V, FMAV, WIDE_ROWS, 4)                                                                     \
        DOT_COLUMNS(T, V, FMAV, 4, 2)                                                                             \
        DOT_COLUMNS(T, V, FMAV, 4, 1)                                                                             \
        TAIL                                                                                                      \
        for (; j < N; j++)                                                                                        \
            for (long i = 0; i < M; i++) {                                                                        \
                T c = zero ? (T)0 : C[i * N + j];                                                                 \
                for (long k = 0; k < K; k++) c = FMA1(A[i * K + k], B[k * N + j], c);                             \
                C[i * N + j] = c;                                                                                 \
            }                                                                                                     \
    }
#define MULADD(a, b, c) ((a) * (b) + (c))
DEFINE_DOT(effattn_dot_f32, float, vf, fma_vf, float, __builtin_fmaf, DOT_COLUMNS(float, vf4, fma_vf4, 4, 1))
DEFINE_DOT(effattn_dot_f64, double, vd, fma_vd, double, __builtin_fma, )
DEFINE_DOT(effattn_dot_i32, int32_t, vi, fma_vi, int32_t, MULADD, )

/* A tile that is stored transposed is loaded row by row, 16 rows at a time, and turned here: stores of single elements
   far apart take several times as long. */
EXPORT void effattn_turn_f32(float *to, const long stride, const float *from, const long n) {
#if defined(__AVX__)
    for (long j = 0; j < n; j += 4)
        for (long r = 0; r < 16; r += 8) {
            const float *f = from + r * n + j;
            __m256 a[4];
            for (int i = 0; i < 4; i++)
                a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(f + i * n)), _mm_loadu_ps(f + (i + 4) * n), 1);
            __m256 low = _mm256_unpacklo_ps(a[0], a[1]), high = _mm256_unpackhi_ps(a[0], a[1]);
            __m256 low2 = _mm256_unpacklo_ps(a[2], a[3]), high2 = _mm256_unpackhi_ps(a[2], a[3]);
            float *t = to + j * stride + r;
            _mm256_storeu_ps(t, _mm256_shuffle_ps(low, low2, 0x44));
            _mm256_storeu_ps(t + stride, _mm256_shuffle_ps(low, low2, 0xee));
            _mm256_storeu_ps(t + 2 * stride, _mm256_shuffle_ps(high, high2, 0x44));
            _mm256_storeu_ps(t + 3 * stride, _mm256_shuffle_ps(high, high2, 0xee));
        }
#else
    for (long j = 0; j < n; j++) for (long r = 0; r < 16; r++) to[j * stride + r] = from[r * n + j];
#endif
}

#define DEFINE_LOAD_ROW(NAME, T, FIRST)                                                                           \
    EXPORT void effattn_load_row_##NAME(float *to, const T *from, const long count, const long n, const float other) { \
        FIRST                                                                                                     \
        INDEPENDENT for (long j = count; j < n; j++) to[j] = other;                                               \
    }
DEFINE_LOAD_ROW(f16, uint16_t, load_row_f16(to, from, count);)
DEFINE_LOAD_ROW(bf16, uint16_t, INDEPENDENT for (long j = 0; j < count; j++) to[j] = bf16_load(from[j]);)
DEFINE_LOAD_ROW(f32, float, INDEPENDENT for (long j = 0; j < count; j++) to[j] = from[j];)

EXPORT long effattn_front(const uint8_t *on, const long n) {
    long count = 0, j = 0;
    uint64_t some;
    /* Eight at a time: n is a power of two. */
    for (; j + 8 <= n; j += 8) {
        __builtin_memcpy(&some, on + j, 8);
        if (some != 0x0101010101010101u) break;
    }
    for (count = j; count < n && on[count]; count++);
    for (j = count; j < n && (n < 8 || j & 7); j++) if (on[j]) return -1;
    for (; j < n; j += 8) {
        __builtin_memcpy(&some, on + j, 8);
        if (some) return -1;
    }
    return count;
}

/* Reductions of rows of n (a power of two) floats, in the lanes of `DEFINE_REDUCE` in prelude.h. */
enum { PARTS = 16 / VL };
#define DEFINE_REDUCE_V(NAME, T, START, VOP, OP)                                                                  \
    INLINE float NAME##_of(const float *x, const long n) {                                                        \
        float lane[16];                                                                                           \
        if (n < 16) {                                                                                             \
            for (long l = 0; l < n; l++) lane[l] = START(x[l]);                                                   \
            HALVES(OP, lane, n)                                                                                   \
            return lane[0];                                                                                       \
        }                                                                                                         \
        vf part[PARTS];                                                                                           \
        UNROLL for (int p = 0; p < PARTS; p++) part[p] = START(*(const vf *)(x + p * VL));                        \
        for (long j = 16; j < n; j += 16)                                                                         \
            UNROLL for (int p = 0; p < PARTS; p++) part[p] = VOP(part[p], *(const vf *)(x + j + p * VL));         \
        UNROLL for (int h = PARTS / 2; h > 0; h /= 2) UNROLL for (int p = 0; p < h; p++)                          \
            part[p] = VOP(part[p], part[p + h]);                                                                  \
        *(vf *)lane = part[0];                                                                                    \
        HALVES(OP, lane, VL)                                                                                      \
        return lane[0];                                                                                           \
    }
#define SAME(a) (a)
DEFINE_REDUCE_V(effattn_reduce_add_float, float, SAME, ADD, ADD)

/* acc = x > acc ? x : acc never takes a NaN from x, and starts from an infinity, which any number replaces. Where the
   infinity is left, either it is the answer or all values were NaN. */
#if defined(__AVX512F__) && !defined(__clang__)
#define VMAX(acc, x) __builtin_ia32_maxps512_mask(x, acc, acc, (uint16_t)-1, 4)
#define VMIN(acc, x) __builtin_ia32_minps512_mask(x, acc, acc, (uint16_t)-1, 4)
#elif defined(__AVX__) && VL == 8
#define VMAX(acc, x) __builtin_ia32_maxps256(x, acc)
#define VMIN(acc, x) __builtin_ia32_minps256(x, acc)
#else
INLINE vf choose_vf(vi m, vf a, vf b) { return (vf)(((vi)a & m) | ((vi)b & ~m)); }
#define VMAX(acc, x) choose_vf((vi)((x) > (acc)), x, acc)
#define VMIN(acc, x) choose_vf((vi)((x) < (acc)), x, acc)
#endif
#define SMAX(acc, x) ((x) > (acc) ? (x) : (acc))
#define SMIN(acc, x) ((x) < (acc) ? (x) : (acc))
#define LOWEST(x) VMAX((vf){0} - __builtin_inff(), x)
#define HIGHEST(x) VMIN((vf){0} + __builtin_inff(), x)
INLINE float keep_nan(float r, float start, const float *x, long n) {
    if (r != start) return r;
    for (long j = 0; j < n; j++) if (x[j] == x[j]) return r;
    return x[0];
}
#define DEFINE_REDUCE_M(NAME, START, FIRST, VOP, OP)                                                              \
    INLINE float NAME##_of(const float *x, const long n) {                                                        \
        float lane[16];                                                                                           \
        if (n < 16) {                                                                                             \
            for (long l = 0; l < n; l++) lane[l] = OP(START, x[l]);                                               \
            HALVES(OP, lane, n)                                                                                   \
            return keep_nan(lane[0], START, x, n);                                                                \
        }                                                                                                         \
        vf part[PARTS];                                                                                           \
        UNROLL for (int p = 0; p < PARTS; p++) part[p] = FIRST(*(const vf *)(x + p * VL));                        \
        for (long j = 16; j < n; j += 16)                                                                         \
            UNROLL for (int p = 0; p < PARTS; p++) part[p] = VOP(part[p], *(const vf *)(x + j + p * VL));         \
        UNROLL for (int h = PARTS / 2; h > 0; h /= 2) UNROLL for (int p = 0; p < h; p++)                          \
            part[p] = VOP(part[p], part[p + h]);                                                                  \
        *(vf *)lane = part[0];                                                                                    \
        HALVES(OP, lane, VL)                                                                                      \
        return keep_nan(lane[0], START, x, n);                                                                    \
    }
DEFINE_REDUCE_M(effattn_reduce_maxnum_float, -__builtin_inff(), LOWEST, VMAX, SMAX)
DEFINE_REDUCE_M(effattn_reduce_minnum_float, __builtin_inff(), HIGHEST, VMIN, SMIN)

#define DEFINE_REDUCE_ROWS(NAME)                                                                                  \
    EXPORT float NAME(const float *x, const long n) { return NAME##_of(x, n); }                                   \
    EXPORT void NAME##_rows(float *to, const float *x, const long n, const long rows, const long step, const long to_step) { \
        for (long i = 0; i < rows; i++) to[i * to_step] = NAME##_of(x + i * step, n);                             \
    }
DEFINE_REDUCE_ROWS(effattn_reduce_add_float)
DEFINE_REDUCE_ROWS(effattn_reduce_maxnum_float)
DEFINE_REDUCE_ROWS(effattn_reduce_minnum_float)
