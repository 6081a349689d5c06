/* Tile products as tensor cores compute them; see models.py for the model and its sources.

   Two ways to add a block, with the same result. In doubles: a product of two 11-bit significands, scaled by a power of
   two and truncated, is an integer below 2^(F + 2), and sums of 33 such integers are exact. In floats and 32-bit
   integers, which is twice as quick, where no exponent comes near the ends of fp32's range. Loops run along a row of B,
   so the compiler vectorises them. */

#include "prelude.h"

/* Exponent of a nonzero number, at least `lowest` (subnormals of the operand's type); far below everything for 0, far
   above for infinity and NaN, also beside a 0. */
enum { NOTHING = -100000, EVERYTHING = 300000 };
INLINE int32_t exponent_of(float x, int32_t lowest) {
    int32_t field = (int32_t)((bits_of(x) >> 23) & 0xffu), e = field - 127;
    e = e < lowest ? lowest : e;
    e = field == 255 ? EVERYTHING : e;
    return x == 0.0f ? NOTHING : e;
}

INLINE float toward_zero(double d) {
    float f = (float)d;
    double back = (double)f, a = d < 0 ? -d : d, b = back < 0 ? -back : back;
    uint32_t u = bits_of(f);
    return f32_of(b > a && a < 0x1p128 ? u - 1u : u);
}

/* 2^e by its bits */
INLINE double power(int32_t e) { return f64_of((uint64_t)(int64_t)(1023 + e) << 52); }

/* Columns and rows that are worked on together, and the longest block. */
enum { STRIP = 32, ROWS = 16, LONGEST = 32 };
/* What a sum is rounded to: fp32 toward zero, fp32 with 13 fraction bits toward zero, fp16 to nearest even. */
enum { TO_F32 = 0, TO_E8M13 = 1, TO_F16 = 2 };

typedef struct { float b[LONGEST][STRIP]; int32_t e[LONGEST][STRIP]; } block_t;

/* VL columns in doubles, for everything. */
static __attribute__((noinline)) void add_any(float *c, const float *a, const block_t *block, long at, long count, int bits,
                                              const int32_t *largest, int to) {
    double scale[VL], sum[VL];
    int32_t top[VL];
    for (long j = 0; j < VL; j++) {
        top[j] = largest[j] < 300 ? largest[j] : 300; /* beyond: the result is an infinity or NaN */
        scale[j] = power(bits - top[j]);
        sum[j] = __builtin_trunc((double)c[j] * scale[j]);
    }
    for (long k = 0; k < count; k++) {
        double x = a[k];
        const float *b = block->b[k] + at;
        for (long j = 0; j < VL; j++) sum[j] += __builtin_trunc(x * (double)b[j] * scale[j]);
    }
    for (long j = 0; j < VL; j++) {
        double s = sum[j] * power(top[j] - bits);
        if (to == TO_F16) c[j] = f64_to_f16(s);
        else {
            float f = toward_zero(s);
            c[j] = to == TO_E8M13 && f == f ? f32_of(bits_of(f) & ~0x3ffu) : f;
        }
    }
}

typedef double vlong_d __attribute__((vector_size(VL * 8)));
typedef int64_t vlong_i __attribute__((vector_size(VL * 8)));
INLINE vi larger(vi a, vi b) {
    vi m = a > b;
    return (a & m) | (b & ~m);
}
INLINE vlong_d vpower(vi e) { return (vlong_d)(__builtin_convertvector(e + 1023, vlong_i) << 52); }

/* c[STRIP] = round(c + sum of a[k] b[k][]) over one block. */
INLINE void add_block(float *c, const float *a, const block_t *block, long count, int bits, int low_a, int low_c, int to) {
    int32_t ea[LONGEST];
    for (long k = 0; k < count; k++) ea[k] = exponent_of(a[k], low_a);
    for (long at = 0; at < STRIP; at += VL, c += VL) {
        vi most = (vi){0} + 2 * NOTHING, top;
        for (long k = 0; k < count; k++) most = larger(*(const vi *)(block->e[k] + at) + ea[k], most);
        for (long j = 0; j < VL; j++) {
            int32_t e = exponent_of(c[j], low_c);
            top[j] = e > -126 ? e : -126;
        }
        top = larger(most, top);
        vi edge = (top > 100) | ((most > NOTHING / 2) & (top < -100));
        int32_t any = to == TO_F16;
        for (long j = 0; j < VL; j++) any |= edge[j];
        if (__builtin_expect(any, 0)) {
            int32_t largest[VL];
            for (long j = 0; j < VL; j++) largest[j] = top[j];
            add_any(c, a, block, at, count, bits, largest, to);
            continue;
        }
        /* A product is exact in fp32, or so small that it is truncated to 0. Eight terms and C fit 32 bits. */
        vf scale = (vf)((127 + bits - top) << 23), old = *(const vf *)c;
        vlong_d sum = __builtin_convertvector(__builtin_convertvector(old * scale, vi), vlong_d);
        for (long k0 = 0; k0 < count; k0 += 8) {
            vi part = {0};
            long k1 = k0 + 8 < count ? k0 + 8 : count;
            for (long k = k0; k < k1; k++)
                part += __builtin_convertvector(a[k] * *(const vf *)(block->b[k] + at) * scale, vi);
            sum += __builtin_convertvector(part, vlong_d);
        }
        /* Toward zero by the bits of the double, whose exponent is far from the ends of fp32's range. */
        vlong_i cut = (vlong_i)(sum * vpower(top - bits)) & (~(int64_t)0 << (to == TO_E8M13 ? 39 : 29));
        vi found = (vi)__builtin_convertvector((vlong_d)cut, vf);
        /* Where all products are 0, C stays, however small. */
        vi alone = (vi)old & (to == TO_E8M13 ? ~0x3ff : ~0), m = most > NOTHING / 2;
        *(vi *)c = (found & m) | (alone & ~m);
    }
}

/* C[M x N] (+)= A[M x K] B[K x N], row-major, contiguous, in blocks of `block` products with `bits` fractional bits.

   low_a, low_b, low_c: smallest normal exponents of the types of A, B and C. `promote` > 0: sums of so many products
   start from 0 and are added to C in fp32, to nearest. `zero` starts from 0 instead of from C. */
EXPORT void effattn_dot_blocks(const float *A, const float *B, float *C, long M, long N, long K, int zero, int block,
                               int bits, int low_a, int low_b, int low_c, int to, long promote) {
    static const float zeros[STRIP];
    for (long j0 = 0; j0 < N; j0 += STRIP) {
        long w = N - j0 < STRIP ? N - j0 : STRIP;
        for (long i0 = 0; i0 < M; i0 += ROWS) {
            long rows = M - i0 < ROWS ? M - i0 : ROWS;
            float total[ROWS][STRIP] = {{0}}, part[ROWS][STRIP];
            block_t now;
            if (!zero)
                for (long i = 0; i < rows; i++) __builtin_memcpy(total[i], C + (i0 + i) * N + j0, w * 4);
            for (long k0 = 0; k0 < K;) {
                long end = promote > 0 && promote < K - k0 ? k0 + promote : K;
                for (long i = 0; i < rows; i++) __builtin_memcpy(part[i], promote > 0 ? zeros : total[i], sizeof zeros);
                for (; k0 < end; k0 += block) {
                    long count = block < end - k0 ? block : end - k0;
                    for (long k = 0; k < count; k++) {
                        float line[STRIP] = {0};
                        __builtin_memcpy(line, B + (k0 + k) * N + j0, w * 4);
                        for (long j = 0; j < STRIP; j++) now.b[k][j] = line[j], now.e[k][j] = exponent_of(line[j], low_b);
                    }
                    for (long i = 0; i < rows; i++) {
                        const float *a = A + (i0 + i) * K + k0;
                        /* Loops of known length are unrolled and kept in registers. */
                        if (to == TO_F32 && count == 16) add_block(part[i], a, &now, 16, bits, low_a, low_c, TO_F32);
                        else if (to == TO_F32 && count == 8) add_block(part[i], a, &now, 8, bits, low_a, low_c, TO_F32);
                        else if (to == TO_F32 && count == 4) add_block(part[i], a, &now, 4, bits, low_a, low_c, TO_F32);
                        else add_block(part[i], a, &now, count, bits, low_a, low_c, to);
                    }
                }
                k0 = end;
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < STRIP; j++) total[i][j] = promote > 0 ? total[i][j] + part[i][j] : part[i][j];
            }
            for (long i = 0; i < rows; i++) __builtin_memcpy(C + (i0 + i) * N + j0, total[i], w * 4);
        }
    }
}

/* A chain per element, c = round(c + round(a b)). */
#define DEFINE_UNFUSED(NAME, T)                                                                                   \
    EXPORT void NAME(const T *A, const T *B, T *C, long M, long N, long K, int zero) {                            \
        for (long i = 0; i < M; i++) {                                                                            \
            T *c = C + i * N;                                                                                     \
            if (zero) for (long j = 0; j < N; j++) c[j] = 0;                                                      \
            for (long k = 0; k < K; k++) {                                                                        \
                const T a = A[i * K + k], *b = B + k * N;                                                         \
                INDEPENDENT for (long j = 0; j < N; j++) c[j] = c[j] + a * b[j];                                  \
            }                                                                                                     \
        }                                                                                                         \
    }
DEFINE_UNFUSED(effattn_dot_unfused_f32, float)
DEFINE_UNFUSED(effattn_dot_unfused_f64, double)
