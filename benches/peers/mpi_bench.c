/* One rank of a collective under MPI, measured as `tensorwire bench` measures its own:
 *
 *     mpi_bench COLLECTIVE SIZE,SIZE,... BATCHES TOUCH
 *
 * A batch is a loop of calls between two barriers, its figure the slowest rank's mean; the median over batches is
 * reported. TOUCH 1 overwrites the input before every call, inside the timed loop. Each size is first called once
 * on numbers that tell ranks and elements apart, and nothing is timed unless the result is right. Rank 0 prints a
 * line of JSON a size. What SIZE counts is told in README.md; sizes are cut to whole blocks, and a size without
 * an element a rank is left out. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BATCH_SECONDS 0.06
#define WORLD MPI_COMM_WORLD

static int me, ranks;

/* Buffers of one size. `block` is the elements that go to or come from one rank. */
typedef struct {
    float *in, *out;
    size_t in_len, out_len;
    int block;
} Case;

/* Element i of rank r's input: small whole numbers, so that sums are exact. */
static float input(int r, size_t i) { return (float)((i * 7 + (size_t)r * 13) % 1009); }

static float summed(size_t i) {
    float sum = 0;
    for (int r = 0; r < ranks; r++) sum += input(r, i);
    return sum;
}

static void all_reduce(Case *c) { MPI_Allreduce(MPI_IN_PLACE, c->in, c->block, MPI_FLOAT, MPI_SUM, WORLD); }
static void all_gather(Case *c) { MPI_Allgather(c->in, c->block, MPI_FLOAT, c->out, c->block, MPI_FLOAT, WORLD); }
static void reduce_scatter(Case *c) { MPI_Reduce_scatter_block(c->in, c->out, c->block, MPI_FLOAT, MPI_SUM, WORLD); }
static void broadcast(Case *c) { MPI_Bcast(c->in, c->block, MPI_FLOAT, 0, WORLD); }
static void reduce(Case *c) {
    MPI_Reduce(me ? c->in : MPI_IN_PLACE, c->in, c->block, MPI_FLOAT, MPI_SUM, 0, WORLD);
}
static void gather(Case *c) { MPI_Gather(c->in, c->block, MPI_FLOAT, c->out, c->block, MPI_FLOAT, 0, WORLD); }
static void scatter(Case *c) { MPI_Scatter(c->in, c->block, MPI_FLOAT, c->out, c->block, MPI_FLOAT, 0, WORLD); }
static void all_to_all(Case *c) { MPI_Alltoall(c->in, c->block, MPI_FLOAT, c->out, c->block, MPI_FLOAT, WORLD); }
static void send_recv(Case *c) {
    int next = (me + 1) % ranks, before = (me + ranks - 1) % ranks;
    MPI_Sendrecv(c->in, c->block, MPI_FLOAT, next, 0, c->out, c->block, MPI_FLOAT, before, 0, WORLD, MPI_STATUS_IGNORE);
}
static void barrier(Case *c) { (void)c, MPI_Barrier(WORLD); }

static float sum_here(const Case *c, size_t i) { (void)c; return summed(i); }
static float sum_of_block(const Case *c, size_t i) { return summed((size_t)me * c->block + i); }
static float of_root(const Case *c, size_t i) { (void)c; return input(0, i); }
static float of_block_owner(const Case *c, size_t i) { return input((int)(i / c->block), i % c->block); }
static float of_root_block(const Case *c, size_t i) { return input(0, (size_t)me * c->block + i); }
static float of_owner_for_me(const Case *c, size_t i) {
    return input((int)(i / c->block), (size_t)me * c->block + i % c->block);
}
static float of_rank_before(const Case *c, size_t i) { (void)c; return input((me + ranks - 1) % ranks, i); }

/* How many elements a buffer has: none, those of SIZE, a block of it for each rank, or SIZE for each rank. */
enum Extent { NONE, WHOLE, SHARE, TIMES };

static const struct Collective {
    const char *name;
    void (*call)(Case *);
    float (*right)(const Case *, size_t);
    enum Extent in, out; /* out NONE: in place */
    int split;           /* SIZE is the input of all ranks' blocks */
    int root_only;       /* only rank 0 has a result */
} ALL[] = {
    {"all_reduce", all_reduce, sum_here, WHOLE, NONE, 0, 0},
    {"all_gather", all_gather, of_block_owner, WHOLE, TIMES, 0, 0},
    {"reduce_scatter", reduce_scatter, sum_of_block, WHOLE, SHARE, 1, 0},
    {"broadcast", broadcast, of_root, WHOLE, NONE, 0, 0},
    {"reduce", reduce, sum_here, WHOLE, NONE, 0, 1},
    {"gather", gather, of_block_owner, WHOLE, TIMES, 0, 1},
    {"scatter", scatter, of_root_block, WHOLE, SHARE, 1, 0},
    {"all_to_all", all_to_all, of_owner_for_me, WHOLE, WHOLE, 1, 0},
    {"send_recv", send_recv, of_rank_before, WHOLE, WHOLE, 0, 0},
    {"barrier", barrier, NULL, NONE, NONE, 0, 0},
};

static float *elements(size_t n) {
    size_t bytes = (n * sizeof(float) + 4095) / 4096 * 4096 + 4096;
    float *p = aligned_alloc(4096, bytes);
    if (!p) {
        fprintf(stderr, "mpi_bench: no memory for %zu bytes\n", bytes);
        MPI_Abort(WORLD, 1);
    }
    return memset(p, 0, bytes);
}

static size_t extent(enum Extent e, size_t whole) {
    return e == NONE ? 0 : e == WHOLE ? whole : e == SHARE ? whole / ranks : whole * ranks;
}

static void verify(const struct Collective *k, Case *c) {
    for (size_t i = 0; i < c->in_len; i++) c->in[i] = input(me, i);
    k->call(c);
    const float *got = k->out == NONE ? c->in : c->out;
    size_t len = k->out == NONE ? c->in_len : c->out_len;
    for (size_t i = 0; k->right && i < len && !(k->root_only && me); i++)
        if (got[i] != k->right(c, i)) {
            fprintf(stderr, "mpi_bench: %s: rank %d's element %zu is wrong\n", k->name, me, i);
            MPI_Abort(WORLD, 1);
        }
    memset(c->in, 0, c->in_len * sizeof(float));
}

static double slowest_mean(const struct Collective *k, Case *c, long calls, int touch) {
    MPI_Barrier(WORLD);
    double start = MPI_Wtime();
    for (long i = 0; i < calls; i++) {
        if (touch) memset(c->in, 0, c->in_len * sizeof(float));
        k->call(c);
    }
    double mean = (MPI_Wtime() - start) / calls;
    MPI_Allreduce(MPI_IN_PLACE, &mean, 1, MPI_DOUBLE, MPI_MAX, WORLD);
    return mean;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(WORLD, &me);
    MPI_Comm_size(WORLD, &ranks);
    const struct Collective *k = NULL;
    for (size_t i = 0; argc == 5 && i < sizeof ALL / sizeof *ALL; i++)
        if (!strcmp(argv[1], ALL[i].name)) k = &ALL[i];
    int batches = argc == 5 ? atoi(argv[3]) : 0;
    if (!k || batches < 1) {
        if (!me) fprintf(stderr, "usage: mpi_bench COLLECTIVE SIZE,... BATCHES TOUCH\n");
        MPI_Abort(WORLD, 2);
    }
    double *means = malloc(batches * sizeof *means);
    for (char *size = strtok(argv[2], ","); size; size = strtok(NULL, ",")) {
        size_t whole = strtoull(size, NULL, 10) / sizeof(float);
        if (k->split) whole = whole / ranks * ranks;
        if (k->in == NONE) whole = 0;
        else if (!whole) continue;
        Case c = {.block = (int)(k->split ? whole / ranks : whole)};
        c.in_len = extent(k->in, whole);
        c.out_len = extent(k->out, whole);
        c.in = elements(c.in_len);
        c.out = elements(c.out_len);
        verify(k, &c);
        long calls = 4;
        for (int trial = 0; trial < 2; trial++) {
            double fit = BATCH_SECONDS / slowest_mean(k, &c, calls, atoi(argv[4]));
            calls = fit < 3 ? 3 : fit > 100000 ? 100000 : (long)fit;
        }
        for (int b = 0; b < batches; b++) means[b] = slowest_mean(k, &c, calls, atoi(argv[4])) * 1e6;
        qsort(means, batches, sizeof *means, ascending);
        if (!me) {
            printf("{\"bytes\":%zu,\"median_us\":%.4f}\n", whole * sizeof(float), means[batches / 2]);
            fflush(stdout);
        }
        free(c.in);
        free(c.out);
        if (k->in == NONE) break;
    }
    free(means);
    MPI_Finalize();
    return 0;
}
