/* Runtime of the CPU backend: a small thread pool that runs the programs of a grid.

   Why not OpenMP: it would tie every build to a runtime library that not every compiler brings.
   Programs are handed out one index at a time from an atomic counter, so uneven programs (causal attention)
   balance themselves. The caller works too, and alone where waking another thread would take longer than the work.
   Working memory is one arena per thread, kept between launches.

   Ctrl-C: Python's own handler only notes a signal until the interpreter runs again, which is after the launch. While
   the main thread launches, a handler in front of it also sets `interrupted`, which the loops of kernels look at. */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

typedef void (*kernel_fn)(const int64_t *args, int32_t x, int32_t y, int32_t z, int32_t gx, int32_t gy,
                          int32_t gz, char *arena, const int *stop);

/* What effattn_launch returns. In all but DONE the grid is incomplete. */
enum { DONE, NO_MEMORY, INTERRUPTED, TOO_LARGE };

/* What a launch passes, packed in this order by the caller. */
typedef struct {
    uint64_t kernel;
    int64_t gx, gy, gz, threads, arena_bytes;
    uint64_t cost;  /* address of the kernel's memory between launches: nanoseconds a program took, 0 at first */
    int64_t args[];
} launch_t;

typedef struct {
    const launch_t *launch;
    const int *stop; /* programs end early where it is not 0 */
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

static int interrupted; /* the main thread's launch is to end */
static const int never;
static struct sigaction usual; /* what happens at SIGINT while nothing is launched */
static atomic_int watching;

static int is_set(const int *stop) { return __atomic_load_n(stop, __ATOMIC_RELAXED); }

/* Steps aside and sends the signal again. The usual handler is not called from here: LLVM, which Triton brings, installs
   one that does the same, and a handler that is put back after it has stepped aside ends the process. */
static void on_interrupt(int number) {
    if (atomic_exchange(&watching, 0)) sigaction(number, &usual, NULL);
    __atomic_store_n(&interrupted, 1, __ATOMIC_RELAXED);
    raise(number); /* blocked until we return */
}

/* Watches for Ctrl-C if this is the main thread and the process handles the signal. Returns the flag to look at. */
static const int *watch(void) {
    if (syscall(SYS_gettid) != getpid()) return &never; /* Python raises in the main thread alone */
    struct sigaction ours = {.sa_handler = on_interrupt, .sa_flags = SA_ONSTACK};
    if (sigaction(SIGINT, NULL, &usual) || usual.sa_handler == SIG_DFL || usual.sa_handler == SIG_IGN) return &never;
    interrupted = 0;
    atomic_store(&watching, 1);
    if (!sigaction(SIGINT, &ours, NULL)) return &interrupted;
    atomic_store(&watching, 0);
    return &never;
}

static void unwatch(const int *stop) {
    if (stop == &interrupted && atomic_exchange(&watching, 0)) sigaction(SIGINT, &usual, NULL);
}

static void program(const launch_t *l, int64_t i, const int *stop) {
    int64_t gxy = l->gx * l->gy, rest = i % gxy;
    ((kernel_fn)l->kernel)(l->args, (int32_t)(rest % l->gx), (int32_t)(rest / l->gx), (int32_t)(i / gxy),
                           (int32_t)l->gx, (int32_t)l->gy, (int32_t)l->gz, arena, stop);
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
        if (i >= job.count || is_set(job.stop)) return done;
        program(job.launch, i, job.stop);
    }
}

static void *worker(void *unused) {
    unsigned long long seen = 0;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL); /* signals are for the threads of the program */
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

/* Waits for the launch of another thread; 0 where this one was interrupted meanwhile. */
static int take_turn(const int *stop) {
    while (pthread_mutex_trylock(&launch_lock)) {
        if (is_set(stop)) return 0;
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_nsec += 20000000;
        if (t.tv_nsec >= 1000000000) t.tv_nsec -= 1000000000, t.tv_sec++;
        if (!pthread_mutex_timedlock(&launch_lock, &t)) break;
    }
    return 1;
}

/* Programs from `first` on, by the pool. */
static int together(const launch_t *l, int64_t first, int64_t count, const int *stop) {
    if (!take_turn(stop)) return DONE;
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
    job.stop = stop;
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
    return failed ? NO_MEMORY : DONE;
}

/* Runs a grid. */
EXPORT int effattn_launch(const launch_t *l) {
    pthread_once(&once, setup);
    if (l->gx <= 0 || l->gy <= 0 || l->gz <= 0) return 0;
    int64_t count, cost = *(int64_t *)l->cost, i = 0;
    if (l->gx > INT32_MAX || l->gy > INT32_MAX || l->gz > INT32_MAX ||
        __builtin_mul_overflow(l->gx * l->gy, l->gz, &count)) return TOO_LARGE;
    unsigned before = ieee();
    const int *stop = watch();
    int status = DONE;
    if (count == 1 || l->threads == 1 || (cost > 0 && cost < WORTH_WAKING / count)) {
        /* Little work, as far as the last launch tells: call for help only where it takes longer after all. */
        if (ensure_arena(l->arena_bytes)) {
            int64_t start = now(), spent = 0;
            while (i < count && !is_set(stop) && (spent < 2 * WORTH_WAKING || l->threads == 1 || i == count - 1)) {
                program(l, i++, stop);
                spent = now() - start;
            }
            if (i) *(int64_t *)l->cost = spent / i;
        } else status = NO_MEMORY;
    }
    if (status == DONE && i < count) status = together(l, i, count, stop);
    if (is_set(stop)) status = INTERRUPTED;
    unwatch(stop);
    restore(before);
    return status;
}
