/* The sanitizer: what instrumented kernels call, and the launch that runs them.

   Programs run one after the other on the calling thread, in an order that the launch gives. Every access is looked at
   before it happens; one that would leave its tensor ends its program by a jump out of the kernel, so that nothing outside
   is ever read or written. Appended to runtime.c. */

#include <setjmp.h>
#include <signal.h>
#include <string.h>

/* The same numbers are in probes.py and checked_launch.py. */
enum { LOAD, STORE, ATOMIC, OVERFLOW_, DIVISION, LOOP };
enum { RELEASES = 1, ACQUIRES = 2 };
enum { RACES = 1, TRAFFIC = 2, WRAPS = 4 };
enum { OUTSIDE = 1, WILD, WRAPPED, ZERO_DIVISOR, ENDLESS, WAITS, SIGNAL, RACE };

typedef struct { int64_t lo, hi; } extent_t; /* addresses, hi exclusive; hi < lo: not known */
/* The argument whose tensor is accessed (-1: one of several, or none), and where in `choices` those several are. */
typedef struct { int32_t kind, base, size, flags, choice_at, choice_count; } site_t;
/* `kinds`: bits 1 << LOAD, 1 << STORE, 1 << ATOMIC of the sites that may touch it; only their cells exist. */
typedef struct { int64_t lo, hi, shift, kinds; uint32_t *cells[3]; } region_t;
typedef struct { int64_t bytes, sectors, last; } traffic_t;
typedef struct {
    int32_t kind, site, other_site, slot;
    int64_t program, other_program, address, value, times;
} finding_t;
typedef struct { int64_t program, previous; } release_t;
typedef struct { int64_t release, next; } acquired_t;
typedef struct {
    int64_t flags, site_bits, max_turns, max_spins, max_nanoseconds;
    int64_t slots, known_count, site_count, region_count, finding_count, capacity, stopped;
    const extent_t *args, *known;
    const site_t *sites;
    const int32_t *choices;
    const int64_t *region_of; /* by slot; -1: none */
    region_t *regions;
    traffic_t *traffic; /* by site */
    const int64_t *order;
    finding_t *findings;
} checks_t;

EXPORT int64_t effattn_ticks, effattn_fill_int;
EXPORT float effattn_fill_float, effattn_fill_half, effattn_fill_eighth;

enum { TURNS = 4096 }; /* of loops, between two looks at the clock */

static checks_t *checks;
static int64_t running, turns, started, spins;
static const char *spin_at;
static int32_t spin_site, last_site; /* the last access that was looked at, which comes next */
static sigjmp_buf leave;
static __thread int inside; /* this thread runs a program of an instrumented kernel */

static finding_t *note(int kind, int32_t site, int32_t other_site, int32_t slot) {
    for (int64_t i = 0; i < checks->finding_count; i++) {
        finding_t *f = &checks->findings[i];
        if (f->kind == kind && f->site == site && f->other_site == other_site && f->slot == slot) {
            f->times++;
            return NULL;
        }
    }
    if (checks->finding_count == checks->capacity) return NULL;
    finding_t *f = &checks->findings[checks->finding_count++];
    *f = (finding_t){.kind = kind, .site = site, .other_site = other_site, .slot = slot, .times = 1};
    f->program = running;
    f->other_program = -1;
    return f;
}

static void end_program(void) { siglongjmp(leave, 1); }

/* -------------------------------------------------------------------------------------------------- races */

/* Programs run whole, one after the other, so a cell needs no more than the last who wrote and the first who read:
   whoever comes later meets one of them. An atomic update is ordered by itself. What a program did before it released an
   address (any atomic that is not relaxed) happens before what another does after acquiring it.

   Cells are kept from launch to launch and never cleared: a cell holds `base` + (program << site_bits) + site, and each
   launch takes its base beyond all that was stored before, so what is below it is empty. */

static uint32_t *pool, base, beyond = 1;
static size_t pool_cells;
enum { POOL_KEPT = 64 << 20 }; /* cells that are kept between launches */

static release_t *releases;
static int64_t release_count, release_room;
static acquired_t *acquired;
static int64_t acquired_count, acquired_room;
static int64_t *acquired_by; /* by program: its last entry of `acquired`, or -1 */
static int64_t *seen;        /* by program: the program, plus 1, for which it was last found to come before */
static int64_t seen_for, seen_entries, program_count;
static int out_of_memory;
typedef struct { const char *address; int64_t release; } slot_t;
static slot_t *table;
static int64_t table_room, table_count;

static void *grown(void *old, int64_t *room, int64_t size) {
    int64_t more = *room ? *room * 2 : 1024;
    void *found = realloc(old, (size_t)(more * size));
    if (!found) {
        out_of_memory = 1;
        end_program();
    }
    *room = more;
    return found;
}

static slot_t *lookup(const char *address) {
    if (table_count * 2 >= table_room) {
        int64_t before = table_room, room = before ? before * 2 : 1024;
        slot_t *old = table, *fresh = calloc((size_t)room, sizeof *fresh);
        if (!fresh) {
            out_of_memory = 1;
            end_program();
        }
        table = fresh;
        table_room = room;
        table_count = 0;
        for (int64_t i = 0; i < before; i++)
            if (old[i].address) *lookup(old[i].address) = old[i], table_count++;
        free(old);
    }
    uint64_t h = (uint64_t)(uintptr_t)address * 0x9e3779b97f4a7c15u;
    for (uint64_t i = h >> 20;; i++) {
        slot_t *s = &table[i & (uint64_t)(table_room - 1)];
        if (!s->address || s->address == address) return s;
    }
}

static void synchronise(const site_t *s, const char *address) {
    slot_t *at = lookup(address);
    int64_t last = at->address ? at->release : -1;
    if (last >= 0 && releases[last].program == running) return;
    if ((s->flags & ACQUIRES) && last >= 0) {
        if (acquired_count == acquired_room) acquired = grown(acquired, &acquired_room, sizeof *acquired);
        acquired[acquired_count] = (acquired_t){last, acquired_by[running]};
        acquired_by[running] = acquired_count++;
    }
    if (s->flags & RELEASES) {
        if (release_count == release_room) releases = grown(releases, &release_room, sizeof *releases);
        releases[release_count] = (release_t){running, last};
        if (!at->address) at->address = address, table_count++;
        at->release = release_count++;
    }
}

/* Whether everything that program `other` did happens before what the running one does now. */
static int ordered(int64_t other) {
    if (acquired_by[running] < 0) return 0;
    if (seen_for != running + 1 || seen_entries != acquired_count) {
        seen_for = running + 1;
        seen_entries = acquired_count;
        int64_t *todo = malloc((size_t)(program_count + 1) * sizeof *todo), n = 0;
        char *done = calloc((size_t)release_count + 1, 1);
        if (!todo || !done) {
            free(todo);
            free(done);
            out_of_memory = 1;
            end_program();
        }
        seen[running] = 0;
        todo[n++] = running;
        while (n > 0) {
            int64_t p = todo[--n];
            for (int64_t e = acquired_by[p]; e >= 0; e = acquired[e].next)
                for (int64_t r = acquired[e].release; r >= 0 && !done[r]; r = releases[r].previous) {
                    done[r] = 1;
                    int64_t q = releases[r].program;
                    if (seen[q] != seen_for && q != running) seen[q] = seen_for, todo[n++] = q;
                }
        }
        free(todo);
        free(done);
    }
    return seen[other] == seen_for;
}

static void race(region_t *r, int32_t site, int32_t slot, int64_t cell, uint32_t other) {
    int64_t program = (int64_t)((other - base) >> checks->site_bits);
    int32_t other_site = (int32_t)((other - base) & ((1u << checks->site_bits) - 1));
    finding_t *f = note(RACE, site, other_site, slot);
    if (!f) return;
    f->other_program = program;
    f->address = r->lo + (cell << r->shift);
}

/* Whether some cell was last used by another program. */
static uint32_t foreign(const uint32_t *cells, int64_t n, uint32_t me, int bits) {
    uint32_t bad = 0;
    const uint32_t from = base;
    for (int64_t i = 0; i < n; i++) bad |= (cells[i] >= from) & ((cells[i] - from) >> bits != me);
    return bad;
}

static void touch(region_t *r, int32_t site, int kind, int32_t slot, int64_t first, int64_t n) {
    const int bits = (int)checks->site_bits;
    const uint32_t me = (uint32_t)running, mine = base + (me << bits) + (uint32_t)site, from = base;
    uint32_t *cells[3], bad = 0;
    for (int k = LOAD; k <= ATOMIC; k++) {
        cells[k] = r->kinds & 1 << k ? r->cells[k] + first : NULL;
        /* Against stores of others always; against their loads and atomics where this is a store. */
        if (cells[k] && (k == STORE || kind == STORE)) bad |= foreign(cells[k], n, me, bits);
    }
    if (__builtin_expect(bad != 0, 0)) {
        static const int order[3] = {STORE, LOAD, ATOMIC};
        int found = 0;
        for (int64_t i = 0; i < n && !found; i++)
            for (int k = 0; k < (kind == STORE ? 3 : 1) && !found; k++) {
                const uint32_t *at = cells[order[k]];
                if (!at || at[i] < from || (at[i] - from) >> bits == me || ordered((at[i] - from) >> bits)) continue;
                race(r, site, slot, first + i, at[i]);
                found = 1;
            }
    }
    uint32_t *own = cells[kind];
    if (kind == LOAD)
        for (int64_t i = 0; i < n; i++) own[i] = own[i] >= from ? own[i] : mine;
    else
        for (int64_t i = 0; i < n; i++) own[i] = mine;
}

static void touch_all(int32_t site, const site_t *s, int32_t slot, const char *first, int64_t step, int64_t count) {
    int64_t which = checks->region_of[slot];
    if (which < 0) return;
    region_t *r = &checks->regions[which];
    int64_t at = (int64_t)(intptr_t)first - r->lo;
    if (step < 0) at += step * (count - 1), step = -step;
    if (step == 0) count = 1;
    int64_t cells = s->size >> r->shift;
    if (step == s->size) {
        touch(r, site, s->kind, slot, at >> r->shift, count * cells);
        return;
    }
    for (int64_t i = 0; i < count; i++) touch(r, site, s->kind, slot, (at + i * step) >> r->shift, cells);
}

/* ------------------------------------------------------------------------------------------------ accesses */

/* Which of the launch's tensors an address is in; -1: in none. */
static int32_t slot_at(int64_t lo, int64_t hi) {
    for (int64_t i = 0; i < checks->slots; i++)
        if (checks->args[i].lo <= lo && hi <= checks->args[i].hi) return (int32_t)i;
    return -1;
}

/* The same among the arguments that a site chooses from. */
static int32_t chosen_at(const site_t *s, int64_t lo, int64_t hi) {
    for (int32_t i = 0; i < s->choice_count; i++) {
        int32_t slot = checks->choices[s->choice_at + i];
        if (checks->args[slot].lo <= lo && hi <= checks->args[slot].hi) return slot;
    }
    return -1;
}

static int is_known(int64_t lo, int64_t hi) {
    int64_t a = 0, b = checks->known_count;
    while (a < b) { /* the first that begins after lo */
        int64_t m = (a + b) / 2;
        if (checks->known[m].lo <= lo) a = m + 1;
        else b = m;
    }
    return a > 0 && hi <= checks->known[a - 1].hi;
}

static void outside(int32_t site, int32_t slot, int64_t at, int64_t step, int64_t count, int64_t lo, int64_t hi) {
    int64_t size = checks->sites[site].size;
    for (int64_t i = 0; i < count; i++, at += step)
        if (at < lo || at + size > hi) break;
    finding_t *f = note(slot < 0 ? WILD : OUTSIDE, site, -1, slot);
    if (f) f->address = at;
    end_program();
}

EXPORT void effattn_access(int32_t site, const char *first, int64_t step, int64_t count) {
    const site_t *s = &checks->sites[site];
    if (count <= 0) return;
    last_site = site;
    int64_t lo = (int64_t)(intptr_t)first, end = lo + step * (count - 1);
    int64_t hi = (end > lo ? end : lo) + s->size;
    int32_t slot = s->base;
    if (end < lo) lo = end;
    if (slot >= 0 && checks->args[slot].hi >= checks->args[slot].lo) {
        const extent_t *e = &checks->args[slot];
        if (__builtin_expect((lo < e->lo) | (hi > e->hi), 0))
            outside(site, slot, (int64_t)(intptr_t)first, step, count, e->lo, e->hi);
    } else if (s->choice_count > 0) {
        slot = chosen_at(s, lo, hi);
        for (int64_t i = 0, at = (int64_t)(intptr_t)first; slot < 0 && i < count; i++, at += step)
            if (chosen_at(s, at, at + s->size) < 0) outside(site, -1, at, 0, 1, 1, 0);
    } else {
        slot = slot_at(lo, hi);
        if (slot < 0 && !is_known(lo, hi)) {
            /* Element by element: a row may go on from one tensor to the next. */
            for (int64_t i = 0, at = (int64_t)(intptr_t)first; i < count; i++, at += step)
                if (slot_at(at, at + s->size) < 0 && !is_known(at, at + s->size)) outside(site, -1, at, 0, 1, 1, 0);
        }
    }
    if (s->kind != STORE && count == 1) {
        if (first != spin_at || site != spin_site) spin_at = first, spin_site = site, spins = 0;
        else if (++spins >= checks->max_spins) {
            finding_t *f = note(WAITS, site, -1, slot);
            if (f) f->address = lo, f->value = spins;
            checks->stopped = 1;
            end_program();
        }
    } else spins = 0;
    if (checks->flags & TRAFFIC) {
        traffic_t *t = &checks->traffic[site];
        int64_t width = step < 0 ? -step : step;
        t->bytes += count * s->size;
        if (width <= 32) {
            t->sectors += ((hi - 1) >> 5) - (lo >> 5) + ((lo >> 5) != t->last);
            t->last = (hi - 1) >> 5;
        } else {
            for (int64_t i = 0, at = (int64_t)(intptr_t)first; i < count; i++, at += step)
                t->sectors += ((at + s->size - 1) >> 5) - (at >> 5) + 1;
        }
    }
    if (checks->flags & RACES) {
        if (s->kind == ATOMIC)
            for (int64_t i = 0; i < count; i++) synchronise(s, first + i * step);
        if (slot >= 0) touch_all(site, s, slot, first, step, count);
    }
}

/* ------------------------------------------------------------------------------- arithmetic, loops, signals */

EXPORT void effattn_fault(int32_t site, int64_t value) {
    int divides = checks->sites[site].kind == DIVISION;
    if (!(checks->flags & WRAPS)) return;
    finding_t *f = note(divides ? ZERO_DIVISOR : WRAPPED, site, -1, checks->sites[site].base);
    if (f) f->value = value;
    end_program();
}

EXPORT void effattn_tick(int32_t site) {
    turns += TURNS;
    effattn_ticks = TURNS;
    if (turns < checks->max_turns && now() - started < checks->max_nanoseconds) return;
    finding_t *f = note(ENDLESS, site, -1, -1);
    if (f) f->value = turns;
    checks->stopped = 1;
    end_program();
}

static struct sigaction former[3];
static const int faults[3] = {SIGSEGV, SIGBUS, SIGFPE};

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)context;
    if (inside) {
        finding_t *f = note(SIGNAL, last_site, -1, last_site < 0 ? -1 : checks->sites[last_site].base);
        if (f) f->value = number, f->address = (int64_t)(intptr_t)info->si_addr;
        checks->stopped = 1;
        end_program();
    }
    /* Another thread's: as if we were not here. The instruction runs again and meets the former handler. */
    for (int i = 0; i < 3; i++)
        if (faults[i] == number) sigaction(number, &former[i], NULL);
}

static void forget(void) {
    free(releases);
    free(acquired);
    free(acquired_by);
    free(seen);
    free(table);
    releases = NULL, acquired = NULL, acquired_by = NULL, seen = NULL, table = NULL;
    release_count = release_room = acquired_count = acquired_room = table_room = table_count = 0;
    seen_for = seen_entries = 0;
    if (pool_cells > POOL_KEPT) {
        free(pool);
        pool = NULL;
        pool_cells = 0;
    }
}

/* A number that tells the contents of memory apart, where chance alone is to be feared. */
EXPORT uint64_t effattn_digest(const unsigned char *at, int64_t size) {
    uint64_t h[8] = {1, 2, 3, 4, 5, 6, 7, 8}, sum = (uint64_t)size;
    int64_t i = 0;
    for (; i + 64 <= size; i += 64)
        for (int k = 0; k < 8; k++) {
            uint64_t word;
            memcpy(&word, at + i + 8 * k, 8);
            h[k] = (h[k] ^ word) * 0x9e3779b97f4a7c15u;
            h[k] ^= h[k] >> 29;
        }
    for (; i < size; i++) h[0] = (h[0] ^ at[i]) * 0x9e3779b97f4a7c15u, h[0] ^= h[0] >> 29;
    for (int k = 0; k < 8; k++) sum = (sum ^ h[k]) * 0xbf58476d1ce4e5b9u, sum ^= sum >> 31;
    return sum;
}

static int prepare(int64_t count) {
    if (!(checks->flags & RACES)) return 1;
    program_count = count;
    acquired_by = malloc((size_t)count * sizeof *acquired_by);
    seen = calloc((size_t)count, sizeof *seen);
    if (!acquired_by || !seen) return 0;
    for (int64_t i = 0; i < count; i++) acquired_by[i] = -1;
    size_t wanted = 0;
    for (int pass = 0; pass < 2; pass++) {
        size_t at = 0;
        for (int64_t i = 0; i < checks->region_count; i++) {
            region_t *r = &checks->regions[i];
            for (int k = LOAD; k <= ATOMIC; k++) {
                if (!(r->kinds & 1 << k)) continue;
                if (pass) r->cells[k] = pool + at;
                at += (size_t)((r->hi - r->lo) >> r->shift) + 16;
            }
        }
        wanted = at;
        if (!pass && wanted > pool_cells) {
            free(pool);
            pool = calloc(wanted, sizeof *pool);
            pool_cells = pool ? wanted : 0;
            if (!pool) return 0;
        }
    }
    uint64_t unit = (uint64_t)1 << checks->site_bits, start = (beyond + unit - 1) / unit * unit;
    if (start + ((uint64_t)count << checks->site_bits) > UINT32_MAX) {
        memset(pool, 0, pool_cells * sizeof *pool);
        start = unit;
    }
    base = (uint32_t)start;
    beyond = (uint32_t)(start + ((uint64_t)count << checks->site_bits));
    return 1;
}

/* Runs a grid, one program after the other. Returns as effattn_launch does. */
EXPORT int effattn_launch_checked(const launch_t *l, checks_t *given) {
    if (l->gx <= 0 || l->gy <= 0 || l->gz <= 0) return 0;
    int64_t count = l->gx * l->gy * l->gz;
    checks = given;
    out_of_memory = 0;
    if (!ensure_arena(l->arena_bytes) || !prepare(count)) {
        forget();
        return 1;
    }
    struct sigaction ours;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&ours.sa_mask);
    for (int i = 0; i < 3; i++) sigaction(faults[i], &ours, &former[i]);
    unsigned before = ieee();
    const int *const stop = watch();
    for (volatile int64_t i = 0; i < count && !checks->stopped && !out_of_memory && !is_set(stop); i++) {
        running = checks->order ? checks->order[i] : i;
        turns = 0;
        spins = 0;
        spin_at = NULL;
        last_site = -1;
        effattn_ticks = TURNS;
        started = now();
        inside = 1;
        if (sigsetjmp(leave, 0) == 0) program(l, running, stop);
        inside = 0;
    }
    restore(before);
    for (int i = 0; i < 3; i++) sigaction(faults[i], &former[i], NULL);
    forget();
    int status = is_set(stop) ? INTERRUPTED : out_of_memory ? NO_MEMORY : DONE;
    unwatch(stop);
    return status;
}
