/* How far apart the first two processors that this process may use are: the round trip, in nanoseconds, of a cache
 * line that a thread on each writes in turn. The median of short rounds, on standard output. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { ROUNDS = 101, TRIPS = 1000 };

static _Alignas(128) atomic_int ping, pong;
static int processor[2];

static void pin(int to) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(to, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void *answer(void *unused) {
    pin(processor[1]);
    for (int n = 1; n <= ROUNDS * TRIPS; n++) {
        while (atomic_load_explicit(&ping, memory_order_acquire) < n) {}
        atomic_store_explicit(&pong, n, memory_order_release);
    }
    return unused;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static int order(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(void) {
    cpu_set_t allowed;
    int found = 0;
    sched_getaffinity(0, sizeof allowed, &allowed);
    for (int i = 0; i < CPU_SETSIZE && found < 2; i++) {
        if (CPU_ISSET(i, &allowed)) processor[found++] = i;
    }
    if (found < 2) {
        fputs("distance: needs two processors\n", stderr);
        return 2;
    }
    pthread_t other;
    if (pthread_create(&other, NULL, answer, NULL)) {
        perror("distance: starting a thread");
        return 1;
    }
    pin(processor[0]);
    double trip[ROUNDS];
    for (int round = 0, n = 1; round < ROUNDS; round++) {
        double start = now();
        for (int i = 0; i < TRIPS; i++, n++) {
            atomic_store_explicit(&ping, n, memory_order_release);
            while (atomic_load_explicit(&pong, memory_order_acquire) < n) {}
        }
        trip[round] = (now() - start) / TRIPS;
    }
    pthread_join(other, NULL);
    qsort(trip, ROUNDS, sizeof *trip, order);
    printf("%.0f\n", trip[ROUNDS / 2]);
    return 0;
}
