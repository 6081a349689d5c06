/* Runtime of the CPU backend: a small thread pool that runs the programs of a grid.

   Why not OpenMP: it would tie every build to a runtime library that not every compiler brings.
   Programs are handed out one index at a time from an atomic counter, so uneven programs (causal attention)
   balance themselves. The caller works too, and alone where waking another thread would take longer than the work.
   Working memory is one arena per thread, kept between launches. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

typedef void (*kernel_fn)(const int64_t *args, int32_t x, int32_t y, int32_t z, int32_t gx, int32_t gy,
                          int32_t gz, char *arena);

/* What a launch passes, packed in this order by the caller. */
typedef struct {
    uint64_t kernel;
    int64_t gx, gy, gz, threads, arena_bytes;
    uint64_t cost;  /* address of the kernel's memory between launches: nanoseconds a program took, 0 at first */
    int64_t args[];
} launch_t;

typedef struct {
    const launch_t *launch;
    int64_t count, seats; /* seats: workers that may still join */
    atomic_llong next;
    atomic_int failed; /* some thread could not get its working memory */
} job_t;

/* Waking a thread that sleeps takes 10 to 50 us until it works. */
enum { MAX_WORKERS = 255, SPINS = 2000, WORTH_WAKING = 60000 };

static pthread_mutex_t launch_lock = PTHREAD_MUTEX_INITIALIZER; /* one launch at a time */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, idle = PTHREAD_COND_INITIALIZER;
static job_t job;
static atomic_ullong generation;
static atomic_int active;
static int workers;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static __thread char *arena;
static __thread int64_t arena_size;

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static int ensure_arena(int64_t bytes) {
    if (bytes <= arena_size) return 1;
    free(arena);
    arena = NULL;
    arena_size = 0;
    int64_t size = (bytes + 4095) & ~(int64_t)4095;
    arena = aligned_alloc(4096, (size_t)size);
    if (!arena) return 0;
    arena_size = size;
    return 1;
}

static void program(const launch_t *l, int64_t i) {
    int64_t gxy = l->gx * l->gy, rest = i % gxy;
    ((kernel_fn)l->kernel)(l->args, (int32_t)(rest % l->gx), (int32_t)(rest / l->gx), (int32_t)(i / gxy),
                           (int32_t)l->gx, (int32_t)l->gy, (int32_t)l->gz, arena);
}

/* IEEE arithmetic, whatever the calling thread does with subnormals or rounding. */
static unsigned ieee(void) {
#if defined(__SSE__)
    unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1f80);
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return (unsigned)before;
#else
    return 0;
#endif
}

static void restore(unsigned before) {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr(before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)before));
#else
    (void)before;
#endif
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

/* Works on the job; returns how many programs this thread ran. */
static int64_t run(void) {
    if (!ensure_arena(job.launch->arena_bytes)) {
        atomic_store(&job.failed, 1);
        atomic_store(&job.next, job.count);
        return 0;
    }
    for (int64_t done = 0;; done++) {
        int64_t i = atomic_fetch_add_explicit(&job.next, 1, memory_order_relaxed);
        if (i >= job.count) return done;
        program(job.launch, i);
    }
}

static void *worker(void *unused) {
    unsigned long long seen = 0;
    (void)unused;
    for (;;) {
        /* Launches often come in a row: look for the next one for a moment before sleeping. */
        for (int i = 0; i < SPINS && atomic_load_explicit(&generation, memory_order_acquire) == seen; i++) relax();
        pthread_mutex_lock(&lock);
        while (atomic_load(&generation) == seen) pthread_cond_wait(&work, &lock);
        seen = atomic_load(&generation);
        int mine = job.seats > 0 && atomic_load(&job.next) < job.count;
        if (mine) job.seats--, atomic_fetch_add(&active, 1);
        pthread_mutex_unlock(&lock);
        if (!mine) continue;
        run();
        pthread_mutex_lock(&lock);
        if (atomic_fetch_sub(&active, 1) == 1) pthread_cond_signal(&idle);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

/* A forked child has none of the threads: start again from nothing. */
static void after_fork(void) {
    workers = 0;
    atomic_store(&active, 0);
    pthread_mutex_init(&launch_lock, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&work, NULL);
    pthread_cond_init(&idle, NULL);
}

static void setup(void) { pthread_atfork(NULL, NULL, after_fork); }

/* Programs from `first` on, by the pool. */
static int together(const launch_t *l, int64_t first, int64_t count) {
    pthread_mutex_lock(&launch_lock);
    int64_t wanted = l->threads - 1;
    if (wanted > count - first - 1) wanted = count - first - 1;
    if (wanted > MAX_WORKERS) wanted = MAX_WORKERS;
    pthread_mutex_lock(&lock);
    while (workers < wanted) {
        pthread_t thread;
        pthread_attr_t attr;
        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attr, 16u << 20);
        int error = pthread_create(&thread, &attr, worker, NULL);
        pthread_attr_destroy(&attr);
        if (error) break; /* fewer threads are still right */
        workers++;
    }
    job.launch = l;
    job.seats = wanted;
    atomic_store(&job.failed, 0);
    atomic_store(&job.next, first);
    job.count = count;
    if (wanted > 0) {
        atomic_fetch_add_explicit(&generation, 1, memory_order_release);
        pthread_cond_broadcast(&work);
    }
    pthread_mutex_unlock(&lock);
    int64_t start = now(), done = run();
    if (done > 0) *(int64_t *)l->cost = (now() - start) / done;
    for (int i = 0; i < SPINS && atomic_load(&active) > 0; i++) relax();
    pthread_mutex_lock(&lock);
    while (atomic_load(&active) > 0) pthread_cond_wait(&idle, &lock);
    job.count = 0;
    int failed = atomic_load(&job.failed);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&launch_lock);
    return failed;
}

/* Runs a grid. Returns 0, or 1 where working memory could not be had (the grid is then incomplete). */
EXPORT int effattn_launch(const launch_t *l) {
    pthread_once(&once, setup);
    if (l->gx <= 0 || l->gy <= 0 || l->gz <= 0) return 0;
    int64_t count = l->gx * l->gy * l->gz, cost = *(int64_t *)l->cost, i = 0;
    unsigned before = ieee();
    int failed = 0;
    if (count == 1 || l->threads == 1 || (cost > 0 && cost < WORTH_WAKING / count)) {
        /* Little work, as far as the last launch tells: call for help only where it takes longer after all. */
        if (ensure_arena(l->arena_bytes)) {
            int64_t start = now(), spent = 0;
            while (i < count && (spent < 2 * WORTH_WAKING || l->threads == 1 || i == count - 1)) {
                program(l, i++);
                spent = now() - start;
            }
            *(int64_t *)l->cost = spent / i;
        } else failed = 1;
    }
    if (!failed && i < count) failed = together(l, i, count);
    restore(before);
    return failed;
}
