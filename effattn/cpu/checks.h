/* What instrumented kernels call; see checks.c. */

extern void effattn_access(int32_t site, const char *first, int64_t step, int64_t count);
extern void effattn_fault(int32_t site, int64_t value) __attribute__((cold));
extern void effattn_tick(int32_t site) __attribute__((cold));
extern int64_t effattn_ticks, effattn_fill_int;
extern float effattn_fill_float, effattn_fill_half, effattn_fill_eighth;

#define EFFATTN_TICK(site) \
    if (__builtin_expect(--effattn_ticks < 0, 0)) effattn_tick(site)
#define EFFATTN_FITS(type, site, exact)                                                                           \
    do {                                                                                                          \
        int64_t effattn_exact = (exact);                                                                          \
        if (__builtin_expect(effattn_exact != (type)effattn_exact, 0)) effattn_fault(site, effattn_exact);        \
    } while (0)
/* The sum of two unsigned numbers. One in the last 256th of its range stands for a negative number, as -1 does. */
#define EFFATTN_SIGNED(U, x) ((int64_t)(U)(x) - ((U)(x) >= (U)-1 - ((U)-1 >> 8) ? (int64_t)(U)-1 + 1 : 0))
#define EFFATTN_SUM(U, a, b)                                                                                      \
    ((int64_t)(U)(a) + (U)(b) <= (int64_t)(U)-1 ? (int64_t)(U)(a) + (U)(b)                                        \
                                                : EFFATTN_SIGNED(U, a) + EFFATTN_SIGNED(U, b))
