/* Tile products as tensor cores compute them; see models.py for the model and its sources.

   All in doubles: a product of two 11-bit significands, scaled by a power of two and truncated, is an integer below
   2^(F + 2), and sums of 33 such integers are exact. Loops run along a row of B, so the compiler vectorises them. */

#include "prelude.h"

static __thread void *model_space;
static __thread long model_size;

static void *model_room(long bytes) {
    if (bytes > model_size) {
        free(model_space);
        model_space = aligned_alloc(64, (size_t)((bytes + 63) & ~63L));
        model_size = model_space ? bytes : 0;
    }
    return model_space;
}

/* Exponent of a nonzero number, at least `lowest` (subnormals of the operand's type); far below everything for 0. */
enum { NOTHING = -100000 };
INLINE int32_t exponent_of(float x, int32_t lowest) {
    int32_t e = (int32_t)((bits_of(x) >> 23) & 0xffu) - 127;
    e = e < lowest ? lowest : e;
    return x == 0.0f ? NOTHING : e;
}

INLINE float toward_zero(double d) {
    float f = (float)d;
    double back = (double)f, a = d < 0 ? -d : d, b = back < 0 ? -back : back;
    uint32_t u = bits_of(f);
    return f32_of(b > a && a < 0x1p128 ? u - 1u : u);
}

/* C[M x N] (+)= A[M x K] B[K x N] in blocks of `block` products, `bits` fractional bits; `lowest`: smallest normal exponent
   of the operands' type. Returns 0 where working memory could not be had. */
EXPORT int effattn_dot_blocks(const float *A, const float *B, float *C, long M, long N, long K, int zero, int block,
                              int bits, int lowest) {
    long row = (N + 7) & ~7L;
    char *room = model_room(K * row * 12 + row * 24);
    if (!room) return 0;
    double *b = (double *)room;              /* K x row */
    double *sum = b + K * row, *scale = sum + row;
    int32_t *eb = (int32_t *)(scale + row);  /* K x row */
    int32_t *top = eb + K * row;
    for (long k = 0; k < K; k++) INDEPENDENT for (long j = 0; j < N; j++) {
        b[k * row + j] = B[k * N + j];
        eb[k * row + j] = exponent_of(B[k * N + j], lowest);
    }
    for (long i = 0; i < M; i++) {
        float *c = C + i * N;
        if (zero) for (long j = 0; j < N; j++) c[j] = 0.0f;
        for (long k0 = 0; k0 < K; k0 += block) {
            long k1 = k0 + block < K ? k0 + block : K;
            INDEPENDENT for (long j = 0; j < N; j++) top[j] = exponent_of(c[j], -126);
            for (long k = k0; k < k1; k++) {
                int32_t ea = exponent_of(A[i * K + k], lowest);
                const int32_t *e = eb + k * row;
                INDEPENDENT for (long j = 0; j < N; j++) top[j] = top[j] > ea + e[j] ? top[j] : ea + e[j];
            }
            INDEPENDENT for (long j = 0; j < N; j++) {
                int64_t e = top[j] > -1000 ? top[j] : 0;
                scale[j] = f64_of((uint64_t)(1023 + bits - e) << 52);
                sum[j] = __builtin_trunc((double)c[j] * scale[j]);
            }
            for (long k = k0; k < k1; k++) {
                double a = A[i * K + k];
                const double *x = b + k * row;
                INDEPENDENT for (long j = 0; j < N; j++) sum[j] += __builtin_trunc(a * x[j] * scale[j]);
            }
            /* An infinity or NaN among the operands: trunc and the sum have carried it through. */
            INDEPENDENT for (long j = 0; j < N; j++) c[j] = toward_zero(sum[j] / scale[j]);
        }
    }
    return 1;
}
