/* What every generated kernel starts with: number formats, elementary functions, reductions.

   Values of type f16 and bf16 are carried in floats that are exactly representable in their type: each operation
   computes in fp32 and rounds once to the type. For + - * / and sqrt this equals rounding the exact result, since
   fp32 has at least 2p + 2 bits for both. NaN: any NaN stays a NaN; its sign and payload are not specified. */

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline, unused))
/* In every loop of a kernel's body: Ctrl-C ends it. */
#define CHECK_STOP if (__builtin_expect(__atomic_load_n(stop, __ATOMIC_RELAXED), 0)) return
/* A loop nest of a kernel: its own function, since compilers take longer the larger a function is. */
#define NEST static __attribute__((noinline))
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

/* Integers too long for a double, rounded to odd: a later rounding to fewer bits comes out right. */
INLINE double u64_odd(uint64_t a) {
    uint64_t odd = (a | ((a & 0x7ffu) ? 0x800u : 0u)) & ~(uint64_t)0x7ffu;
    return (double)(a >> 53 ? odd : a);
}
INLINE double i64_odd(int64_t a) { return a < 0 ? -u64_odd(0 - (uint64_t)a) : u64_odd((uint64_t)a); }

/* a * b + c of 16-bit floats, rounded to odd: the product is exact in double, and the error of the sum is known
   (Knuth's two-sum). */
INLINE double fma_odd(float a, float b, float c) {
    double p = (double)a * b, s = p + c, t = s - p;
    double e = (p - (s - t)) + (c - t);
    uint64_t u = bits64_of(s);
    uint64_t nearer = (e > 0) == (s > 0) ? u + 1 : u - 1;
    return (e < 0) | (e > 0) && !(u & 1u) ? f64_of(nearer) : s;
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

/* maxnum, minnum: a NaN loses, and which of two zeros is returned is left open. maximum, minimum: a NaN wins, and -0
   is less than +0. Equal numbers have equal bits unless they are zeros. */
#define DEFINE_MINMAX(T, OF, BITS)                                                                                \
    INLINE T maxnum_##T(T a, T b) { return (a > b) | (b != b) ? a : b; }                                          \
    INLINE T minnum_##T(T a, T b) { return (a < b) | (b != b) ? a : b; }                                          \
    INLINE T maximum_##T(T a, T b) { return a == b ? OF(BITS(a) & BITS(b)) : ((a > b) | (a != a) ? a : b); }      \
    INLINE T minimum_##T(T a, T b) { return a == b ? OF(BITS(a) | BITS(b)) : ((a < b) | (a != a) ? a : b); }
DEFINE_MINMAX(float, f32_of, bits_of)
DEFINE_MINMAX(double, f64_of, bits64_of)

/* ------------------------------------------------------------------------------- elementary functions */

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* To an integer: t = x + INTEGER has k + 254 in its low bits, where k is x rounded to nearest even. 254 is twice the bias
   of exponents, so that half of it each goes into two powers of two without further additions. */
#define INTEGER 12583166.0f /* 1.5 * 2^23 + 254 */

/* p * 2^k for k in [-254, 254], in two steps so that gradual underflow and overflow come out right. */
INLINE float scale_f32(float p, float t) {
    uint32_t b = bits_of(t), h = b >> 1;
    return p * f32_of(h << 23) * f32_of((b - h) << 23);
}

/* 2^x: x = k + r, |r| <= 1/2, polynomial of degree 6 with relative error 3e-9; below 1 ulp in all. Outside the range
   of results k and r mean nothing, and the last two lines answer. Written without clamps: the compiler would split
   the loop at them. */
INLINE float exp2_f32(float x) {
    float t = x + INTEGER;
    float r = x - (t - INTEGER);
    float p = 0x1.417a9cp-13f;
    p = FMA(p, r, 0x1.5f0948p-10f);
    p = FMA(p, r, 0x1.3b2dd2p-7f);
    p = FMA(p, r, 0x1.c6af7ap-5f);
    p = FMA(p, r, 0x1.ebfbdcp-3f);
    p = FMA(p, r, 0x1.62e430p-1f);
    p = FMA(p, r, 1.0f);
    float y = scale_f32(p, t);
    y = x < -151.0f ? 0.0f : y;
    return x >= 128.0f ? __builtin_inff() : y;
}

/* e^x: x = k ln 2 + r with ln 2 in two parts, polynomial of degree 6 with relative error 3e-9. */
INLINE float exp_f32(float x) {
    float t = FMA(x, 0x1.715476p+0f, INTEGER);
    float n = t - INTEGER;
    float r = FMA(n, -0x1.62p-1f, x);
    r = FMA(n, -0x1.c85fep-10f, r);
    float p = 0x1.6a4f72p-10f;
    p = FMA(p, r, 0x1.123980p-7f);
    p = FMA(p, r, 0x1.5558aep-5f);
    p = FMA(p, r, 0x1.555492p-3f);
    p = FMA(p, r, 0x1.fffffcp-2f);
    p = FMA(p, r, 1.0f);
    p = FMA(p, r, 1.0f);
    float y = scale_f32(p, t);
    y = x < -104.5f ? 0.0f : y;
    return x > 90.0f ? __builtin_inff() : y;
}

float logf(float), log2f(float), sinf(float), cosf(float), erff(float), tanhf(float), fmodf(float, float);
double exp(double), exp2(double), log(double), log2(double), sin(double), cos(double), erf(double), tanh(double),
    fmod(double, double);

/* ------------------------------------------------------------------------------------------- vectors */

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef float vf4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(VL * 4), aligned(8), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4), may_alias));

/* ------------------------------------------------------------------------------------- tile products */

/* In the runtime library. C[M x N] (+)= A[M x K] B[K x N], row-major, contiguous; `zero` starts from 0 instead of C. */
void effattn_dot_f32(const float *A, const float *B, float *C, long M, long N, long K, int zero);
void effattn_dot_f64(const double *A, const double *B, double *C, long M, long N, long K, int zero);
void effattn_dot_i32(const int32_t *A, const int32_t *B, int32_t *C, long M, long N, long K, int zero);

/* to[j * stride + r] = from[r * n + j] for 16 rows r and n columns j, a multiple of 16. */
void effattn_turn_f32(float *to, long stride, const float *from, long n);

/* Rows: the first `count` elements as floats, then `other` up to n. */
void effattn_load_row_f16(float *to, const uint16_t *from, long count, long n, float other);
void effattn_load_row_bf16(float *to, const uint16_t *from, long count, long n, float other);
void effattn_load_row_f32(float *to, const float *from, long count, long n, float other);

/* How many of n bytes, each 0 or 1, are 1, where these come first; else -1. */
long effattn_front(const uint8_t *on, long n);

/* -------------------------------------------------------------------------------------------- fp16 rows */

#if defined(__F16C__) && !defined(__clang__)
typedef short v8hi __attribute__((vector_size(16), aligned(2), may_alias));
typedef float v8sf __attribute__((vector_size(32), aligned(4), may_alias));
INLINE void load_row_f16(float *to, const uint16_t *from, long n) {
    long j = 0;
    for (; j + 8 <= n; j += 8) {
        v8sf x = __builtin_ia32_vcvtph2ps256(*(const v8hi *)(from + j));
        *(v8sf *)(to + j) = x;
        /* The instruction makes signalling NaNs quiet; a copy must not. */
        if (__builtin_expect(__builtin_ia32_movmskps256(__builtin_ia32_cmpps256(x, x, 3)), 0))
            for (long l = j; l < j + 8; l++) to[l] = f16_load(from[l]);
    }
    for (; j < n; j++) to[j] = f16_load(from[j]);
}
INLINE void round_row_f16(float *x, long n) {
    long j = 0;
    for (; j + 8 <= n; j += 8)
        *(v8sf *)(x + j) = __builtin_ia32_vcvtph2ps256(__builtin_ia32_vcvtps2ph256(*(const v8sf *)(x + j), 0));
    for (; j < n; j++) x[j] = round_f16(x[j]);
}
#else
INLINE void load_row_f16(float *to, const uint16_t *from, long n) {
    INDEPENDENT for (long j = 0; j < n; j++) to[j] = f16_load(from[j]);
}
INLINE void round_row_f16(float *x, long n) {
    INDEPENDENT for (long j = 0; j < n; j++) x[j] = round_f16(x[j]);
}
#endif

/* ---------------------------------------------------------------------------------------- reductions */

/* A row of n (a power of two) values: min(n, 16) lanes, each sequential over j, j + 16, ...; then the lanes are
   combined in halves. The order does not depend on the machine. */
#define ADD(a, b) ((a) + (b))
#define HALVES(OP, x, from) for (long h = (from) / 2; h > 0; h /= 2) for (long l = 0; l < h; l++) x[l] = OP(x[l], x[l + h]);
#define DEFINE_REDUCE(NAME, T, OP)                                                                                \
    INLINE T NAME(const T *x, const long n) {                                                                     \
        T lane[16];                                                                                               \
        const long w = n < 16 ? n : 16;                                                                           \
        for (long l = 0; l < w; l++) lane[l] = x[l];                                                              \
        for (long j = 16; j < n; j += 16) for (long l = 0; l < 16; l++) lane[l] = OP(lane[l], x[j + l]);          \
        HALVES(OP, lane, w)                                                                                       \
        return lane[0];                                                                                           \
    }
DEFINE_REDUCE(reduce_add_double, double, ADD)
DEFINE_REDUCE(reduce_maxnum_double, double, maxnum_double)
DEFINE_REDUCE(reduce_maximum_float, float, maximum_float)
DEFINE_REDUCE(reduce_minimum_float, float, minimum_float)

/* The same for floats, in vectors: in the runtime library. maxnum and minnum leave NaN out where there is a number. */
#define DECLARE_REDUCE(NAME)                                                                                      \
    float effattn_reduce_##NAME(const float *x, long n);                                                          \
    /* to[i * to_step] is that of the row at x + i * step, for i < rows. */                                       \
    void effattn_reduce_##NAME##_rows(float *to, const float *x, long n, long rows, long step, long to_step);
DECLARE_REDUCE(add_float)
DECLARE_REDUCE(maxnum_float)
DECLARE_REDUCE(minnum_float)
