/* What instrumented kernels call; see checks.c. */

extern void effattn_access(int32_t site, const char *first, int64_t step, int64_t count);
extern void effattn_fault(int32_t site, int64_t value) __attribute__((cold));
extern void effattn_tick(int32_t site) __attribute__((cold));
extern int64_t effattn_ticks, effattn_fill_int;
extern float effattn_fill_float, effattn_fill_half, effattn_fill_eighth;

#define EFFATTN_TICK(site) \
    if (__builtin_expect(--effattn_ticks < 0, 0)) effattn_tick(site)
#define EFFATTN_FITS(bits, site, exact)                                                                           \
    do {                                                                                                          \
        int64_t effattn_exact = (exact);                                                                                  \
        if (__builtin_expect(effattn_exact != (int##bits##_t)effattn_exact, 0)) effattn_fault(site, effattn_exact);                       \
    } while (0)
