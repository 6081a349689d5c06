/* What every generated kernel starts with: number formats, elementary functions, reductions, tile products.

   Values of type f16 and bf16 are carried in floats that are exactly representable in their type: each operation
   computes in fp32 and rounds once to the type. For + - * / and sqrt this equals rounding the exact result, since
   fp32 has at least 2p + 2 bits for both. NaN: any NaN stays a NaN; its sign and payload are not specified. */

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline, unused))
#define EXPORT __attribute__((visibility("default")))
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define UNROLL _Pragma("unroll")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* ---------------------------------------------------------------------------------------- bit patterns */

INLINE float f32_of(uint32_t u) { float f; __builtin_memcpy(&f, &u, 4); return f; }
INLINE uint32_t bits_of(float f) { uint32_t u; __builtin_memcpy(&u, &f, 4); return u; }
INLINE double f64_of(uint64_t u) { double f; __builtin_memcpy(&f, &u, 8); return f; }
INLINE uint64_t bits64_of(double f) { uint64_t u; __builtin_memcpy(&u, &f, 8); return u; }

/* ---------------------------------------------------------------------------- bf16: 8 significant bits */

INLINE float bf16_load(uint16_t h) { return f32_of((uint32_t)h << 16); }
INLINE uint16_t bf16_store(float x) { return (uint16_t)(bits_of(x) >> 16); }
/* To nearest, ties to even. */
INLINE float round_bf16(float x) {
    uint32_t u = bits_of(x);
    uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    uint32_t nan = (u | 0x00400000u) & 0xffff0000u;
    return f32_of((u & 0x7fffffffu) > 0x7f800000u ? nan : r);
}

/* ---------------------------------------------------------------------------- fp16: 11 significant bits */

/* Moving the exponent by a multiplication treats subnormals right without a branch. */
INLINE float f16_load(uint16_t h) {
    uint32_t m = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t u = bits_of(f32_of(m) * 0x1p112f);
    u = m >= 0x0f800000u ? u | 0x7f800000u : u; /* infinities and NaN */
    return f32_of(u | ((uint32_t)(h & 0x8000u) << 16));
}
INLINE uint16_t f16_store(float x) {
    uint32_t u = bits_of(x), a = u & 0x7fffffffu;
    uint32_t finite = bits_of(f32_of(a) * 0x1p-112f) >> 13;
    uint32_t special = 0x7c00u | ((a >> 13) & 0x3ffu);
    return (uint16_t)((a >= 0x7f800000u ? special : finite) | ((u >> 16) & 0x8000u));
}
/* To nearest, ties to even; overflow to infinity from 65520 on; subnormals are multiples of 2^-24. */
INLINE float round_f16(float x) {
    uint32_t u = bits_of(x), a = u & 0x7fffffffu, s = u & 0x80000000u;
    uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u)) & 0xffffe000u;
    uint32_t small = bits_of((f32_of(a) + 0.5f) - 0.5f); /* one ulp of [0.5, 1) is 2^-24 */
    uint32_t r = a < 0x38800000u ? small : normal;
    r = r >= 0x47800000u ? 0x7f800000u : r;
    r = a > 0x7f800000u ? ((a | 0x00400000u) & 0xffffe000u) : r;
    return f32_of(r | s);
}

/* From double: round to odd at fp32 first, so that the second rounding cannot go wrong. */
INLINE float odd_f32(double x) {
    float f = (float)x;
    double back = (double)f;
    uint32_t u = bits_of(f);
    if (x != x || back == x || (u & 0x7fffffffu) == 0x7f800000u && (x - x) != 0) return f;
    if ((u & 0x7fffffffu) == 0x7f800000u) return f32_of((u & 0x80000000u) | 0x7f7fffffu); /* finite, too large */
    if (u & 1u) return f;
    int away = (back < 0 ? -back : back) > (x < 0 ? -x : x);
    return f32_of(away ? u - 1u : u + 1u);
}
INLINE float f64_to_f16(double x) { return round_f16(odd_f32(x)); }
INLINE float f64_to_bf16(double x) {
    float f = odd_f32(x);
    /* The largest finite fp32 stands for everything beyond it and must round to infinity, as it does. */
    return round_bf16(f);
}

/* tf32: 10 fraction bits, to nearest, ties away from zero, as cvt.rna.tf32 does. */
INLINE float round_tf32(float x) {
    uint32_t u = bits_of(x);
    uint32_t r = (u + 0x1000u) & 0xffffe000u;
    return f32_of((u & 0x7f800000u) == 0x7f800000u ? u : r);
}

/* -------------------------------------------------------------------------------------- integer helpers */

#define DEFINE_INT(T, U, MIN)                                                                                     \
    INLINE T div_##T(T a, T b) { return b == 0 ? (T)-1 : (b == -1 ? (T)(0 - (U)a) : (T)(a / b)); }                \
    INLINE T rem_##T(T a, T b) { return b == 0 ? a : (b == -1 ? (T)0 : (T)(a % b)); }                             \
    INLINE T udiv_##T(T a, T b) { return b == 0 ? (T)-1 : (T)((U)a / (U)b); }                                     \
    INLINE T urem_##T(T a, T b) { return b == 0 ? a : (T)((U)a % (U)b); }                                         \
    INLINE T shl_##T(T a, T b) { return (U)b < sizeof(T) * 8 ? (T)((U)a << b) : (T)0; }                           \
    INLINE T shru_##T(T a, T b) { return (U)b < sizeof(T) * 8 ? (T)((U)a >> b) : (T)0; }                          \
    INLINE T shrs_##T(T a, T b) { return (T)(a >> ((U)b < sizeof(T) * 8 ? b : (T)(sizeof(T) * 8 - 1))); }
DEFINE_INT(int8_t, uint8_t, INT8_MIN)
DEFINE_INT(int16_t, uint16_t, INT16_MIN)
DEFINE_INT(int32_t, uint32_t, INT32_MIN)
DEFINE_INT(int64_t, uint64_t, INT64_MIN)

INLINE int fits_i8(int64_t x) { return x == (int8_t)x; }
INLINE int fits_i16(int64_t x) { return x == (int16_t)x; }
INLINE int fits_i32(int64_t x) { return x == (int32_t)x; }

INLINE int64_t ceildiv_i64(int64_t a, int64_t b) { return a / b + (a % b > 0); }

/* Float to integer: toward zero, saturating, NaN to 0, as PTX's cvt.rzi does. */
#define DEFINE_FPTOSI(N, T, LO, HI)                                                                               \
    INLINE T fptosi_##N(double x) { return x != x ? (T)0 : (x <= (double)(LO) ? (T)(LO) : (x >= (double)(HI) ? (T)(HI) : (T)x)); }
DEFINE_FPTOSI(i8, int8_t, INT8_MIN, INT8_MAX)
DEFINE_FPTOSI(i16, int16_t, INT16_MIN, INT16_MAX)
DEFINE_FPTOSI(i32, int32_t, INT32_MIN, INT32_MAX)
DEFINE_FPTOSI(i64, int64_t, INT64_MIN, INT64_MAX)
DEFINE_FPTOSI(u8, uint8_t, 0, UINT8_MAX)
DEFINE_FPTOSI(u16, uint16_t, 0, UINT16_MAX)
DEFINE_FPTOSI(u32, uint32_t, 0, UINT32_MAX)
DEFINE_FPTOSI(u64, uint64_t, 0, UINT64_MAX)

/* ------------------------------------------------------------------------------- maximum and minimum */

/* maxnum, minnum: a NaN loses. maximum, minimum: a NaN wins. */
#define DEFINE_MINMAX(T)                                                                                          \
    INLINE T maxnum_##T(T a, T b) { return (a > b) | (b != b) ? a : b; }                                          \
    INLINE T minnum_##T(T a, T b) { return (a < b) | (b != b) ? a : b; }                                          \
    INLINE T maximum_##T(T a, T b) { return (a > b) | (a != a) ? a : b; }                                         \
    INLINE T minimum_##T(T a, T b) { return (a < b) | (a != a) ? a : b; }
DEFINE_MINMAX(float)
DEFINE_MINMAX(double)

/* ------------------------------------------------------------------------------- elementary functions */

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* p * 2^k for k in [-300, 300], in two steps so that gradual underflow and overflow come out right. */
INLINE float scale_f32(float p, int32_t k) {
    int32_t h = k >> 1;
    return p * f32_of((uint32_t)(h + 127) << 23) * f32_of((uint32_t)(k - h + 127) << 23);
}

/* 2^x: x = k + r, |r| <= 1/2, polynomial of degree 6 with relative error 3e-9; below 1 ulp in all. */
INLINE float exp2_f32(float x) {
    float c = x < -160.0f ? -160.0f : x;
    c = c > 130.0f ? 130.0f : c;
    float t = c + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    int32_t k = (int32_t)(bits_of(t) - 0x4b400000u);
    float r = c - (t - 12582912.0f);
    float p = 0x1.417a9cp-13f;
    p = FMA(p, r, 0x1.5f0948p-10f);
    p = FMA(p, r, 0x1.3b2dd2p-7f);
    p = FMA(p, r, 0x1.c6af7ap-5f);
    p = FMA(p, r, 0x1.ebfbdcp-3f);
    p = FMA(p, r, 0x1.62e430p-1f);
    p = FMA(p, r, 1.0f);
    return x != x ? x : scale_f32(p, k);
}

/* e^x: x = k ln 2 + r with ln 2 in two parts, polynomial of degree 6 with relative error 3e-9. */
INLINE float exp_f32(float x) {
    float c = x < -110.0f ? -110.0f : x;
    c = c > 90.0f ? 90.0f : c;
    float t = FMA(c, 0x1.715476p+0f, 12582912.0f);
    int32_t k = (int32_t)(bits_of(t) - 0x4b400000u);
    float n = t - 12582912.0f;
    float r = FMA(n, -0x1.62p-1f, c);
    r = FMA(n, -0x1.c85fep-10f, r);
    float p = 0x1.6a4f72p-10f;
    p = FMA(p, r, 0x1.123980p-7f);
    p = FMA(p, r, 0x1.5558aep-5f);
    p = FMA(p, r, 0x1.555492p-3f);
    p = FMA(p, r, 0x1.fffffcp-2f);
    p = FMA(p, r, 1.0f);
    p = FMA(p, r, 1.0f);
    return x != x ? x : scale_f32(p, k);
}

float logf(float), log2f(float), sinf(float), cosf(float), erff(float), tanhf(float), fmodf(float, float);
double exp(double), exp2(double), log(double), log2(double), sin(double), cos(double), erf(double), tanh(double),
    fmod(double, double);

/* ------------------------------------------------------------------------------------------- vectors */

#if defined(__AVX512F__)
#define VL 16
#define MR 8
#elif defined(__AVX__)
#define VL 8
#define MR 4
#else
#define VL 4
#define MR 4
#endif

typedef float vf __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef float vf4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(VL * 4), aligned(8), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4), may_alias));

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

/* ------------------------------------------------------------------------------------- tile products */

/* C[M x N] (+)= A[M x K] B[K x N], row-major, contiguous. Each element is one chain, in the order of k,

       c = fma(a[i][k], b[k][j], c)

   whatever the tiling, so the bits do not depend on the machine's vector length. fp16 and bf16 products are exact in
   fp32, so fused and unfused agree there. `zero` starts from 0 instead of from C. */
#define DOT_PANEL(T, V, FMAV, ROWS, COLS)                                                                         \
    {                                                                                                             \
        V c[ROWS][COLS];                                                                                          \
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int s = 0; s < COLS; s++) c[r][s] =                     \
            zero ? (V){0} : *(const V *)(C + (i + r) * N + j + s * L);                                            \
        for (long k = 0; k < K; k++) {                                                                            \
            V b[COLS];                                                                                            \
            UNROLL for (int s = 0; s < COLS; s++) b[s] = *(const V *)(B + k * N + j + s * L);                     \
            UNROLL for (int r = 0; r < ROWS; r++) {                                                               \
                V a = (V){0} + A[(i + r) * K + k];                                                                \
                UNROLL for (int s = 0; s < COLS; s++) c[r][s] = FMAV(a, b[s], c[r][s]);                           \
            }                                                                                                     \
        }                                                                                                         \
        UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int s = 0; s < COLS; s++)                               \
            *(V *)(C + (i + r) * N + j + s * L) = c[r][s];                                                        \
    }
#define DOT_COLUMNS(T, V, FMAV, COLS)                                                                             \
    {                                                                                                             \
        enum { L = sizeof(V) / sizeof(T) };                                                                       \
        for (; j + COLS * L <= N; j += COLS * L) {                                                                \
            long i = 0;                                                                                           \
            for (; i + MR <= M; i += MR) DOT_PANEL(T, V, FMAV, MR, COLS)                                          \
            for (; i < M; i++) DOT_PANEL(T, V, FMAV, 1, COLS)                                                     \
        }                                                                                                         \
    }
#define DEFINE_DOT(NAME, T, V, FMAV, V1, FMA1, TAIL)                                                              \
    INLINE void NAME(const T *A, const T *B, T *C, const long M, const long N, const long K, const int zero) {    \
        long j = 0;                                                                                               \
        DOT_COLUMNS(T, V, FMAV, 2)                                                                                \
        DOT_COLUMNS(T, V, FMAV, 1)                                                                                \
        TAIL                                                                                                      \
        for (; j < N; j++)                                                                                        \
            for (long i = 0; i < M; i++) {                                                                        \
                T c = zero ? (T)0 : C[i * N + j];                                                                 \
                for (long k = 0; k < K; k++) c = FMA1(A[i * K + k], B[k * N + j], c);                             \
                C[i * N + j] = c;                                                                                 \
            }                                                                                                     \
    }
#define MULADD(a, b, c) ((a) * (b) + (c))
DEFINE_DOT(dot_f32, float, vf, fma_vf, float, __builtin_fmaf, DOT_COLUMNS(float, vf4, fma_vf4, 1))
DEFINE_DOT(dot_f64, double, vd, fma_vd, double, __builtin_fma, )
DEFINE_DOT(dot_i32, int32_t, vi, fma_vi, int32_t, MULADD, )

/* ---------------------------------------------------------------------------------------- reductions */

/* A row of n (a power of two) values: min(n, 16) lanes, each sequential over j, j + 16, ...; then the lanes are
   combined in halves. The order does not depend on the machine. */
#define DEFINE_REDUCE(NAME, T, OP)                                                                                \
    INLINE T NAME(const T *x, const long n) {                                                                     \
        enum { W = 16 };                                                                                          \
        T lane[W];                                                                                                \
        const long w = n < W ? n : W;                                                                             \
        for (long l = 0; l < w; l++) lane[l] = x[l];                                                              \
        for (long j = W; j < n; j += W) UNROLL for (int l = 0; l < W; l++) lane[l] = OP(lane[l], x[j + l]);       \
        if (n >= W) {                                                                                             \
            UNROLL for (int l = 0; l < 8; l++) lane[l] = OP(lane[l], lane[l + 8]);                                \
            UNROLL for (int l = 0; l < 4; l++) lane[l] = OP(lane[l], lane[l + 4]);                                \
            lane[0] = OP(lane[0], lane[2]), lane[1] = OP(lane[1], lane[3]);                                       \
            return OP(lane[0], lane[1]);                                                                          \
        }                                                                                                         \
        for (long h = w / 2; h > 0; h /= 2) for (long l = 0; l < h; l++) lane[l] = OP(lane[l], lane[l + h]);      \
        return lane[0];                                                                                           \
    }
#define ADD(a, b) ((a) + (b))
#define MUL(a, b) ((a) * (b))
#define AND(a, b) ((a) & (b))
#define OR(a, b) ((a) | (b))
#define XOR(a, b) ((a) ^ (b))
#define MAXI(a, b) ((a) > (b) ? (a) : (b))
#define MINI(a, b) ((a) < (b) ? (a) : (b))
DEFINE_REDUCE(reduce_add_float, float, ADD)
DEFINE_REDUCE(reduce_add_double, double, ADD)
DEFINE_REDUCE(reduce_maxnum_float, float, maxnum_float)
DEFINE_REDUCE(reduce_maxnum_double, double, maxnum_double)
DEFINE_REDUCE(reduce_minnum_float, float, minnum_float)
DEFINE_REDUCE(reduce_maximum_float, float, maximum_float)
DEFINE_REDUCE(reduce_minimum_float, float, minimum_float)
