/* Added to the prelude for kernels that use atomics, library functions, inline assembly or assertions. */

#include <fenv.h>
#include <stdio.h>
#include <time.h>

/* ------------------------------------------------------------------------------------------------ atomics */

/* Sequentially consistent, whatever weaker order the kernel asks for. Sums of floats compare and swap the bits, so no
   update is lost; f16 and bf16 round each sum once. */
#define ATOMIC __ATOMIC_SEQ_CST
#define ATOMIC_SWAP(T, p, old, next)                                                                              \
    T old = __atomic_load_n(p, ATOMIC);                                                                           \
    while (!__atomic_compare_exchange_n(p, &old, next, 0, ATOMIC, ATOMIC)) {}                                     \
    return old;
#define DEFINE_ATOMIC_INT(T, U)                                                                                   \
    INLINE T atomic_and_##T(T *p, T v) { return __atomic_fetch_and(p, v, ATOMIC); }                               \
    INLINE T atomic_or_##T(T *p, T v) { return __atomic_fetch_or(p, v, ATOMIC); }                                 \
    INLINE T atomic_xor_##T(T *p, T v) { return __atomic_fetch_xor(p, v, ATOMIC); }                               \
    INLINE T atomic_add_##T(T *p, T v) { return __atomic_fetch_add(p, v, ATOMIC); }                               \
    INLINE T atomic_xchg_##T(T *p, T v) { return __atomic_exchange_n(p, v, ATOMIC); }                             \
    INLINE T atomic_load_##T(T *p) { return __atomic_load_n(p, ATOMIC); }                                         \
    INLINE T atomic_max_##T(T *p, T v) { ATOMIC_SWAP(T, p, old, old > v ? old : v) }                              \
    INLINE T atomic_min_##T(T *p, T v) { ATOMIC_SWAP(T, p, old, old < v ? old : v) }                              \
    INLINE T atomic_umax_##T(T *p, T v) { ATOMIC_SWAP(T, p, old, (U)old > (U)v ? old : v) }                       \
    INLINE T atomic_umin_##T(T *p, T v) { ATOMIC_SWAP(T, p, old, (U)old < (U)v ? old : v) }                       \
    INLINE T atomic_cas_##T(T *p, T old, T v) {                                                                   \
        __atomic_compare_exchange_n(p, &old, v, 0, ATOMIC, ATOMIC);                                               \
        return old;                                                                                               \
    }
DEFINE_ATOMIC_INT(uint8_t, uint8_t)
DEFINE_ATOMIC_INT(int8_t, uint8_t)
DEFINE_ATOMIC_INT(int16_t, uint16_t)
DEFINE_ATOMIC_INT(int32_t, uint32_t)
DEFINE_ATOMIC_INT(int64_t, uint64_t)
/* Carrier, bits, and the way between them. */
#define DEFINE_ATOMIC_FLOAT(NAME, T, U, VALUE, BITS, ROUND)                                                       \
    INLINE T atomic_fadd_##NAME(void *q, T v) {                                                                   \
        U *p = q, old = __atomic_load_n(p, ATOMIC);                                                               \
        while (!__atomic_compare_exchange_n(p, &old, BITS(ROUND(VALUE(old) + v)), 0, ATOMIC, ATOMIC)) {}          \
        return VALUE(old);                                                                                        \
    }                                                                                                             \
    INLINE T atomic_xchg_##NAME(void *q, T v) { return VALUE(__atomic_exchange_n((U *)q, BITS(v), ATOMIC)); }     \
    INLINE T atomic_load_##NAME(void *q) { return VALUE(__atomic_load_n((U *)q, ATOMIC)); }                       \
    INLINE T atomic_cas_##NAME(void *q, T old, T v) {                                                             \
        U bits = BITS(old);                                                                                       \
        __atomic_compare_exchange_n((U *)q, &bits, BITS(v), 0, ATOMIC, ATOMIC);                                   \
        return VALUE(bits);                                                                                       \
    }
#define UNROUNDED(x) (x)
DEFINE_ATOMIC_FLOAT(f16, float, uint16_t, f16_load, f16_store, round_f16)
DEFINE_ATOMIC_FLOAT(bf16, float, uint16_t, bf16_load, bf16_store, round_bf16)
DEFINE_ATOMIC_FLOAT(f32, float, uint32_t, f32_of, bits_of, UNROUNDED)
DEFINE_ATOMIC_FLOAT(f64, double, uint64_t, f64_of, bits64_of, UNROUNDED)

/* The host's clock, for %globaltimer and its like. */
INLINE uint64_t host_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* --------------------------------------------------------------------------------- rounding in a direction */

/* volatile keeps the operation between the two changes of the mode. */
#define DEFINE_DIRECTED(NAME, T, S, MODE, EXPR)                                                                   \
    static __attribute__((noinline, unused)) T NAME(S a_, S b_, S c_) {                                           \
        volatile S a = a_, b = b_, c = c_;                                                                        \
        fesetround(MODE);                                                                                         \
        volatile T r = EXPR;                                                                                      \
        fesetround(FE_TONEAREST);                                                                                 \
        (void)b, (void)c;                                                                                         \
        return r;                                                                                                 \
    }
#define DEFINE_DIRECTED_ALL(NAME, T, S, EXPR)                                                                     \
    DEFINE_DIRECTED(NAME##_rn, T, S, FE_TONEAREST, EXPR)                                                          \
    DEFINE_DIRECTED(NAME##_rz, T, S, FE_TOWARDZERO, EXPR)                                                         \
    DEFINE_DIRECTED(NAME##_ru, T, S, FE_UPWARD, EXPR)                                                             \
    DEFINE_DIRECTED(NAME##_rd, T, S, FE_DOWNWARD, EXPR)
DEFINE_DIRECTED_ALL(fadd, float, float, a + b)
DEFINE_DIRECTED_ALL(fsub, float, float, a - b)
DEFINE_DIRECTED_ALL(fmul, float, float, a * b)
DEFINE_DIRECTED_ALL(fdiv, float, float, a / b)
DEFINE_DIRECTED_ALL(fsqrt, float, float, __builtin_sqrtf(a))
DEFINE_DIRECTED_ALL(ffma, float, float, __builtin_fmaf(a, b, c))
DEFINE_DIRECTED_ALL(dadd, double, double, a + b)
DEFINE_DIRECTED_ALL(dsub, double, double, a - b)
DEFINE_DIRECTED_ALL(dmul, double, double, a * b)
DEFINE_DIRECTED_ALL(ddiv, double, double, a / b)
DEFINE_DIRECTED_ALL(dsqrt, double, double, __builtin_sqrt(a))
DEFINE_DIRECTED_ALL(dfma, double, double, __builtin_fma(a, b, c))
DEFINE_DIRECTED_ALL(double2float, float, double, (float)a)
DEFINE_DIRECTED_ALL(ll2float, float, int64_t, (float)a)
DEFINE_DIRECTED_ALL(ull2float, float, uint64_t, (float)a)
DEFINE_DIRECTED_ALL(ll2double, double, int64_t, (double)a)
DEFINE_DIRECTED_ALL(ull2double, double, uint64_t, (double)a)

/* ------------------------------------------------------------------------------------------ bits and integers */

INLINE uint32_t bit_reverse32(uint32_t x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
INLINE uint64_t bit_reverse64(uint64_t x) {
    return (uint64_t)bit_reverse32((uint32_t)x) << 32 | bit_reverse32((uint32_t)(x >> 32));
}
INLINE int32_t count_leading32(uint32_t x) { return x ? __builtin_clz(x) : 32; }
INLINE int32_t count_leading64(uint64_t x) { return x ? __builtin_clzll(x) : 64; }
/* prmt in its default mode: four selectors of four bits; bit 3 of each copies the sign of the byte. */
INLINE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t s) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t sel = s >> 4 * i & 15u, byte = (uint32_t)(bytes >> 8 * (sel & 7u)) & 255u;
        out |= (sel & 8u ? (byte & 128u ? 255u : 0u) : byte) << 8 * i;
    }
    return out;
}
INLINE int32_t signed24(int32_t x) { return (int32_t)((uint32_t)x << 8) >> 8; }
/* fns: the position of the n-th set bit from `base` upwards (n > 0), downwards (n < 0), or at it (n = 0); else ~0. */
INLINE uint32_t find_nth_set(uint32_t mask, uint32_t base, int32_t n) {
    if (n == 0) return base < 32 && mask >> base & 1u ? base : 0xffffffffu;
    int step = n > 0 ? 1 : -1, left = n > 0 ? n : -n;
    for (int64_t i = base; i >= 0 && i < 32; i += step)
        if (mask >> i & 1u && --left == 0) return (uint32_t)i;
    return 0xffffffffu;
}
/* lop3: any function of three bits, by its truth table. */
INLINE uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t out = 0;
    for (int i = 0; i < 8; i++)
        if (table >> i & 1u) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return out;
}
INLINE uint32_t bit_field(uint32_t a, uint32_t pos, uint32_t len, int is_signed) {
    pos &= 255u, len &= 255u;
    uint64_t wide = is_signed ? (uint64_t)(int64_t)(int32_t)a : a;
    if (len == 0) return 0;
    uint64_t out = pos > 63 ? (is_signed && (int32_t)a < 0 ? ~(uint64_t)0 : 0) : (uint64_t)((int64_t)wide >> pos);
    if (len >= 32) return (uint32_t)out;
    out &= ((uint64_t)1 << len) - 1;
    return (uint32_t)(is_signed && out >> (len - 1) & 1u ? out | ~(uint64_t)0 << len : out);
}

/* --------------------------------------------------------------------------------------- special functions */

double j0(double), j1(double), jn(int, double), y0(double), y1(double), yn(int, double), erfc(double);
double tgamma(double), lgamma(double), exp10(double), log1p(double);

/* exp(x^2) erfc(x): the continued fraction where erfc underflows (Abramowitz and Stegun 7.1.14). */
static __attribute__((unused)) double erfcx_f64(double x) {
    if (x < 25.0) {
        double h = x * x, l = __builtin_fma(x, x, -h); /* an error of h would grow with h */
        return h < 700.0 ? exp(h) * (1.0 + l) * erfc(x) : exp(h) * erfc(x);
    }
    double f = 0;
    for (int k = 60; k > 0; k--) f = k * 0.5 / (x + f);
    return 0.56418958354775628695 / (x + f);
}
/* The inverse of erf by Newton's iteration from Winitzki's approximation. `y` = 1 - |x|, exact near 1. */
static double erfinv_f64(double x);
static __attribute__((unused)) double erfcinv_f64(double y) {
    if (y > 0.5 && y < 1.5) return erfinv_f64(1.0 - y); /* 1 - y is exact there */
    if (y != y || y < 0 || y > 2) return __builtin_nan("");
    if (y == 0) return __builtin_inf();
    if (y == 2) return -__builtin_inf();
    double s = y > 1 ? -1.0 : 1.0, t = y > 1 ? 2.0 - y : y; /* erfc(z) = t, z >= 0 */
    double l = log(t * (2.0 - t)), a = 0.147, h = 2.0 / (3.14159265358979323846 * a) + l * 0.5;
    double z = __builtin_sqrt(__builtin_sqrt(h * h - l / a) - h);
    for (int i = 0; i < 4; i++) {
        double e = (erfc(z) - t) / (-1.12837916709551257390 * exp(-z * z));
        if (!(__builtin_fabs(e) < 1e300)) break;
        z -= e / (1.0 + z * e); /* Halley */
    }
    return s * z;
}
static __attribute__((unused)) double erfinv_f64(double x) {
    if (__builtin_fabs(x) < 0.5) { /* 1 - x would lose digits */
        double z = x * 0.88622692545275801365;
        for (int i = 0; i < 6; i++) z -= (erf(z) - x) / (1.12837916709551257390 * exp(-z * z));
        return z;
    }
    return x > 0 ? erfcinv_f64(1.0 - x) : -erfcinv_f64(1.0 + x);
}
/* The normal distribution's: where 1 - normcdf is small, an error of x / sqrt(2) would grow with x^2. */
static __attribute__((unused)) double normcdf_f64(double x) {
    const double high = 0x1.6a09e667f3bcdp-1, low = -0x1.bdd3413b26456p-55; /* sqrt(1/2) */
    double t = -x * high, rest = __builtin_fma(-x, high, -t) - x * low;
    double y = erfc(t);
    return 0.5 * (y > 0 && y < 2 ? y - 1.12837916709551257390 * exp(-t * t) * rest : y);
}
static __attribute__((unused)) double normcdfinv_f64(double x) {
    return 1.41421356237309504880 * (x > 0.25 && x < 0.75 ? erfinv_f64(2.0 * x - 1.0) : -erfcinv_f64(2.0 * x));
}
/* One step of Newton's iteration: the C library's cbrt is off by up to 3 ulp. */
static __attribute__((unused)) long double cbrt_refined(double x) {
    long double y = __builtin_cbrt(x);
    return y == 0 || y - y != 0 ? y : y - (y * y * y - x) / (3 * y * y);
}
/* Modified Bessel functions: sum of (x^2/4)^k / (k! (k + n)!), scaled so that only the result can overflow. */
static __attribute__((unused)) double bessel_i_f64(int n, double x) {
    long double q = (long double)x * x * 0.25L, term = n ? __builtin_fabs(x) * 0.5L : 1.0L, sum = term;
    for (int k = 1; k < 2000; k++) {
        term *= q / ((long double)k * (k + n));
        sum += term;
        if (term < sum * 1e-21L) break;
    }
    return (double)(n && x < 0 ? -sum : sum);
}
static __attribute__((unused)) double sin_pi(double x) {
    double r = fmod(x, 2.0), a = __builtin_fabs(r), s = r < 0 ? -1.0 : 1.0;
    if (a >= 1.0) a -= 1.0, s = -s;
    if (a > 0.5) a = 1.0 - a;
    return a == 0 ? __builtin_copysign(0.0, x) : s * (a > 0.25 ? cos(3.14159265358979323846 * (0.5 - a)) : sin(3.14159265358979323846 * a));
}
static __attribute__((unused)) double cos_pi(double x) {
    double a = fmod(__builtin_fabs(x), 2.0), s = 1.0;
    if (a > 1.0) a = 2.0 - a;
    if (a > 0.5) a = 1.0 - a, s = -1.0;
    return a == 0.5 ? 0.0 : s * (a > 0.25 ? sin(3.14159265358979323846 * (0.5 - a)) : cos(3.14159265358979323846 * a));
}

/* ------------------------------------------------------------------------------------- inline assembly */

#define FLUSH(x) flush_f32(x)
#define SATURATE(x) saturate_f64(x)
#define RELU(x) relu_f64(x)
INLINE float flush_f32(float x) { uint32_t u = bits_of(x); return (u & 0x7f800000u) ? x : f32_of(u & 0x80000000u); }
INLINE double saturate_f64(double x) { return x > 1 ? 1 : (x > 0 ? x : 0); }
INLINE double relu_f64(double x) { return x > 0 || x != x ? x : 0; }

/* ------------------------------------------------------------------------------------- floats of 8 bits */

/* M fraction bits, exponent bias BIAS, largest finite value MAX. UZ: one zero, NaN in the place of -0. */
#define DEFINE_F8(NAME, M, BIAS, MAX, UZ, NAN_CODE)                                                               \
    INLINE float NAME##_load(uint8_t c) {                                                                         \
        uint32_t a = c & 0x7fu, s = (uint32_t)(c & 0x80u) << 24;                                                  \
        if ((UZ) ? c == 0x80u : a == (NAN_CODE)) return f32_of(s | 0x7fc00000u);                                  \
        float v = a < (1u << (M)) ? (float)a * (2.0f / (float)(1 << (M))) * f32_of((uint32_t)(127 - (BIAS)) << 23) \
                                  : f32_of((a << (23 - (M))) + ((uint32_t)(127 - (BIAS)) << 23));                 \
        return f32_of(bits_of(v) | s);                                                                            \
    }                                                                                                             \
    INLINE uint8_t NAME##_store(float x) {                                                                        \
        uint32_t u = bits_of(x), a = u & 0x7fffffffu, s = u >> 24 & 0x80u;                                        \
        if (a > 0x7f800000u) return (UZ) ? 0x80u : (uint8_t)(s | (NAN_CODE));                                     \
        if (a == 0) return (UZ) ? 0 : (uint8_t)s;                                                                 \
        uint32_t low = (uint32_t)(127 - (BIAS) + 1) << 23;                                                        \
        uint32_t c = a < low ? (uint32_t)(f32_of(a) * (float)(1 << ((M) - 1)) * f32_of((uint32_t)(127 + (BIAS)) << 23)) \
                             : (a - ((uint32_t)(127 - (BIAS)) << 23)) >> (23 - (M));                              \
        return (uint8_t)(s | c);                                                                                  \
    }                                                                                                             \
    INLINE float grid_##NAME(float x, int toward_zero) {                                                          \
        uint32_t u = bits_of(x), a = u & 0x7fffffffu, s = u & 0x80000000u;                                        \
        if (a > 0x7f800000u) return x;                                                                            \
        float v = f32_of(a) < (MAX) ? f32_of(a) : (MAX);                                                          \
        uint32_t e = bits_of(v) >> 23, least = 127 - (BIAS) + 1;                                                  \
        e = e < least ? least : e;                                                                                \
        float big = f32_of(((e + 23 - (M)) << 23) | 0x00400000u); /* 1.5 * 2^23 quanta */                         \
        float r = (v + big) - big;                                                                                \
        if (toward_zero && r > v) r -= f32_of((e - (M)) << 23);                                                   \
        return (UZ) && r == 0 ? 0.0f : f32_of(bits_of(r) | s);                                                    \
    }                                                                                                             \
    INLINE float round_##NAME(float x) { return grid_##NAME(x, 0); }                                              \
    INLINE float truncate_##NAME(float x) { return grid_##NAME(x, 1); }
DEFINE_F8(e4m3fn, 3, 7, 448.0f, 0, 0x7fu)
DEFINE_F8(e4m3fnuz, 3, 8, 240.0f, 1, 0x80u)
DEFINE_F8(e5m2fnuz, 2, 16, 57344.0f, 1, 0x80u)
DEFINE_F8(e5m2_finite, 2, 15, 57344.0f, 0, 0x100u)
INLINE float e5m2_load(uint8_t c) { return f16_load((uint16_t)(c << 8)); }
/* A NaN that was loaded keeps its code; one whose payload lies in the bits that are cut off stays a NaN. */
INLINE uint8_t e5m2_store(float x) {
    uint8_t c = (uint8_t)(f16_store(x) >> 8);
    return x != x && !(c & 3u) ? (uint8_t)(c | 3u) : c;
}
INLINE float round_e5m2(float x) { return round_e5m2_finite(x); }
INLINE float truncate_e5m2(float x) { return truncate_e5m2_finite(x); }

INLINE float truncate_bf16(float x) { return x != x ? x : f32_of(bits_of(x) & 0xffff0000u); }
INLINE float truncate_f16(float x) {
    float r = round_f16(x), m = __builtin_fabsf(r), a = __builtin_fabsf(x);
    if (!(m > a)) return r;
    /* One step toward zero; from infinity to the largest finite value. */
    return m > 65504.0f ? (a > 3.5e38f ? r : __builtin_copysignf(65504.0f, x)) : f16_load((uint16_t)(f16_store(r) - 1));
}
INLINE float truncate_f64_f32(double x) {
    float f = (float)x;
    double m = __builtin_fabs((double)f), a = __builtin_fabs(x);
    return m > a ? f32_of(bits_of(f) - 1u) : f;
}

/* Two to a byte: 1 sign, 2 exponent, 1 fraction bit. */
INLINE float e2m1_load(uint8_t c) {
    static const float value[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    return f32_of(bits_of(value[c & 7u]) | (uint32_t)(c & 8u) << 28);
}
/* To nearest, ties to even, saturating; NaN becomes the largest, as PTX's cvt.rn.satfinite says. */
INLINE uint8_t e2m1_store(float x) {
    float a = __builtin_fabsf(x);
    uint8_t c = !(a <= 5.0f) ? 7 : a >= 3.5f ? 6 : a > 2.5f ? 5 : a >= 1.75f ? 4 : a > 1.25f ? 3 : a >= 0.75f ? 2 : a > 0.25f;
    return x != x ? 7 : (uint8_t)(c | (bits_of(x) >> 28 & 8u));
}
/* A power of two, from 2^-127 on; 255 is NaN. For 16-bit products it is made as Triton makes it. */
INLINE float e8m0_f32(uint8_t c) { return c == 255 ? __builtin_nanf("") : f32_of(c ? (uint32_t)c << 23 : 0x00400000u); }
INLINE float e8m0_bf16(uint8_t c) { return c == 255 ? __builtin_nanf("") : f32_of((uint32_t)c << 23); }
INLINE float e8m0_f16(uint8_t c) { return round_f16(e8m0_bf16(c)); }

/* ------------------------------------------------------------------------------------------- assertions */

/* The first failure of a launch: a flag, then its words. */
EXPORT char effattn_failure[1024];
#define FAIL(...)                                                                                                 \
    do {                                                                                                          \
        char free_ = 0;                                                                                           \
        if (__atomic_compare_exchange_n(effattn_failure, &free_, 1, 0, ATOMIC, ATOMIC))                           \
            snprintf(effattn_failure + 1, sizeof effattn_failure - 1, __VA_ARGS__);                               \
    } while (0)
