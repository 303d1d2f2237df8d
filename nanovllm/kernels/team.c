/* Threads that stay with one caller for the time of a call, and that nobody waits for unless they are at work.
 *
 * An OpenMP region ends when each of its threads has come by. On a busy machine one that is not running holds the
 * others up for a time slice, and a decode step of few tokens has some hundred and eighty regions. Here a thread that
 * does not come is not missed: whoever is there takes the items (`take_items`), and only one inside is waited for.
 * Between calls the threads sleep, so that torch's own have the processors.
 */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "kernels.h"

#define OPEN ((uint64_t)1 << 15) /* state: number of the job << 16 | whether one may enter | how many are inside */
#define SPINS 4096               /* before the processor is offered to others */
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() __asm__ volatile("yield")
#endif

struct team {
    pthread_mutex_t lock;
    pthread_cond_t woken;
    int is_called, is_closing; /* written under the lock */
    uint64_t state;
    void (*body)(void *);
    void *data;
    int size;
    pthread_t threads[];
};

static _Thread_local team *called; /* the team that serves this thread's call */

static void linger(int *spins) {
    if (++*spins < SPINS) PAUSE();
    else sched_yield();
}

static void help(team *t) { /* while the call lasts: enter each job once */
    uint64_t last = 0;
    for (int spins = 0; __atomic_load_n(&t->is_called, __ATOMIC_ACQUIRE); linger(&spins)) {
        uint64_t state = __atomic_load_n(&t->state, __ATOMIC_ACQUIRE);
        if (!(state & OPEN) || state >> 16 == last) continue;
        if (!__atomic_compare_exchange_n(&t->state, &state, state + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) continue;
        t->body(t->data);
        __atomic_fetch_sub(&t->state, 1, __ATOMIC_RELEASE);
        last = state >> 16;
        spins = 0;
    }
}

static void *serve(void *data) {
    team *t = data;
    for (;;) {
        pthread_mutex_lock(&t->lock);
        while (!t->is_called && !t->is_closing) pthread_cond_wait(&t->woken, &t->lock);
        int is_over = t->is_closing;
        pthread_mutex_unlock(&t->lock);
        if (is_over) return NULL;
        help(t);
    }
}

static void set(team *t, int *flag, int value) {
    pthread_mutex_lock(&t->lock);
    __atomic_store_n(flag, value, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&t->woken);
    pthread_mutex_unlock(&t->lock);
}

/* `size` threads beside the caller; fewer where the system has no more, NULL where there is no memory. */
team *team_open(int size) {
    team *t = calloc(1, sizeof(team) + (size_t)size * sizeof(pthread_t));
    if (!t) return NULL;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->woken, NULL);
    while (t->size < size && pthread_create(&t->threads[t->size], NULL, serve, t) == 0) t->size++;
    return t;
}

void team_close(team *t) {
    set(t, &t->is_closing, 1);
    for (int i = 0; i < t->size; i++) pthread_join(t->threads[i], NULL);
    pthread_cond_destroy(&t->woken);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

void team_call(team *t) {
    called = t;
    if (t->size) set(t, &t->is_called, 1);
}

void team_dismiss(team *t) {
    called = NULL;
    if (t->size) __atomic_store_n(&t->is_called, 0, __ATOMIC_RELEASE);
}

/* A `parallel_fn`: `body` in the caller's thread and in those of its team that come in time. */
void team_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    (void)threads, (void)flags;
    team *t = called;
    t->body = body, t->data = data;
    uint64_t job = (__atomic_load_n(&t->state, __ATOMIC_RELAXED) >> 16) + 1;
    __atomic_store_n(&t->state, job << 16 | OPEN, __ATOMIC_RELEASE);
    body(data);
    __atomic_fetch_and(&t->state, ~OPEN, __ATOMIC_ACQ_REL);
    for (int spins = 0; __atomic_load_n(&t->state, __ATOMIC_ACQUIRE) & (OPEN - 1);) linger(&spins);
}
