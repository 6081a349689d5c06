/* Runtime of the CPU backend: a small thread pool that runs the programs of a grid.

   Why not OpenMP: it would tie every build to a runtime library that not every compiler brings.
   Programs are handed out one index at a time from an atomic counter, so uneven programs (causal attention)
   balance themselves. The caller works too. Working memory is one arena per thread, kept between launches. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))

typedef void (*kernel_fn)(const int64_t *args, int32_t x, int32_t y, int32_t z, int32_t gx, int32_t gy,
                          int32_t gz, char *arena);

typedef struct {
    kernel_fn kernel;
    const int64_t *args;
    int64_t gx, gy, gz, count, arena_bytes;
    atomic_llong next;
    atomic_int failed; /* some thread could not get its working memory */
} job_t;

enum { MAX_WORKERS = 255, SPINS = 2000 };

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

static void run(void) {
    if (!ensure_arena(job.arena_bytes)) {
        atomic_store(&job.failed, 1);
        atomic_store(&job.next, job.count);
        return;
    }
    int64_t gx = job.gx, gxy = job.gx * job.gy;
    for (;;) {
        int64_t i = atomic_fetch_add_explicit(&job.next, 1, memory_order_relaxed);
        if (i >= job.count) return;
        int64_t rest = i % gxy;
        job.kernel(job.args, (int32_t)(rest % gx), (int32_t)(rest / gx), (int32_t)(i / gxy), (int32_t)job.gx,
                   (int32_t)job.gy, (int32_t)job.gz, arena);
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
        int mine = atomic_load(&job.next) < job.count;
        if (mine) atomic_fetch_add(&active, 1);
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

/* Runs a grid. Returns 0, or 1 where working memory could not be had (the grid is then incomplete). */
EXPORT int effattn_launch(void *kernel, const int64_t *args, int64_t gx, int64_t gy, int64_t gz, int threads,
                          int64_t arena_bytes) {
    pthread_once(&once, setup);
    int64_t count = gx * gy * gz;
    if (count <= 0) return 0;
    pthread_mutex_lock(&launch_lock);
    int wanted = threads - 1;
    if (wanted > count - 1) wanted = (int)(count - 1);
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
    job.kernel = (kernel_fn)kernel;
    job.args = args;
    job.gx = gx, job.gy = gy, job.gz = gz;
    job.arena_bytes = arena_bytes;
    atomic_store(&job.failed, 0);
    atomic_store(&job.next, 0);
    job.count = count;
    if (wanted > 0) {
        atomic_fetch_add_explicit(&generation, 1, memory_order_release);
        pthread_cond_broadcast(&work);
    }
    pthread_mutex_unlock(&lock);
    run();
    for (int i = 0; i < SPINS && atomic_load(&active) > 0; i++) relax();
    pthread_mutex_lock(&lock);
    while (atomic_load(&active) > 0) pthread_cond_wait(&idle, &lock);
    job.count = 0;
    int failed = atomic_load(&job.failed);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&launch_lock);
    return failed;
}
