/* A TEST LIBRARY, NOT NCCL. It has the functions of NCCL's that tensorwire calls, with NCCL's signatures, over host
 * memory: so that finding the library, its errors, aborting, deadlines and what is composed of its operations can be
 * tested without a GPU. It was written for that from the documentation of NCCL's API, and says nothing about NCCL's
 * speed or rounding: it reduces in rank order, in binary32 (binary64 for that type), and rounds once.
 *
 * Ranks are threads or processes that map one anonymous file, which the id names (/proc/PID/fd/N): nothing stays
 * behind. A stream is what tensorwire's host streams give: an object whose first member enqueues a function.
 *
 * It is stricter than NCCL: on a nonblocking communicator a call before the last one has been seen to be done is an
 * error.
 *
 * TENSORWIRE_FAKE_NCCL="KIND@RANK:CALL" makes rank RANK fail at its CALLth launch on a communicator, from 1:
 *   async_error   the call never ends, and the communicator has an error
 *   stuck         the call never ends
 *   launch_error  the call is refused
 *   init_never    (CALL is 0) the rank never joins
 * FAKE_VERSION, FAKE_NO_SPLIT and FAKE_NO_REGISTER change what it is when it is compiled.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef FAKE_VERSION
#define FAKE_VERSION 22703
#endif

const char tensorwire_test_library[] = "a test library in NCCL's place";

enum { SUCCESS, CUDA_ERROR, SYSTEM_ERROR, INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, IN_PROGRESS };
enum { SUM, PROD, MAX, MIN, AVG, NUM_OPS };
enum { I8, U8, I32, U32, I64, U64, F16, F32, F64, BF16, E4M3, E5M2, NUM_TYPES };
enum { ALL_REDUCE, REDUCE, REDUCE_SCATTER, BROADCAST, ALL_GATHER, SEND, RECV };
enum { NONE, ASYNC_ERROR, STUCK, LAUNCH_ERROR, INIT_NEVER };

#define MAX_WORLD 16
#define SLOT (128 * 1024)
#define PAIR (16 * 1024)
#define MAX_SCALED 16

typedef struct { char text[128]; } unique_id;

typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share;
} config;

/* Shared by the ranks. */
struct pair { _Atomic uint64_t written, read; char data[PAIR]; };
struct seat { _Atomic uint64_t step, meeting; char said[256]; };
struct region {
    _Atomic uint32_t arrived;
    struct seat seats[MAX_WORLD];
    struct pair pairs[MAX_WORLD][MAX_WORLD];
    char slots[MAX_WORLD][SLOT];
};

struct comm {
    struct region *region;
    int rank, world, blocking;
    int fd; /* of the region's file, in who made it, until all have come; else -1 */
    _Atomic int state, aborted, references;
    uint64_t step, meeting;
    uint64_t launched;
    _Atomic uint64_t done; /* launches, which are done in order whatever their streams */
    int kind, at; /* what goes wrong, and when */
    double scaled[MAX_SCALED];
    int in_use[MAX_SCALED];
    int registered;
};

struct stream { void (*enqueue)(struct stream *, void (*)(void *), void *); };

struct operation {
    int what, type, op, peer;
    double factor;
    const char *from;
    char *to;
    size_t count;
};

struct job {
    struct comm *comm;
    struct stream *stream;
    uint64_t number;
    int kind, count;
    struct operation *operations;
};

static _Thread_local char last_error[256];
static _Thread_local int depth, failed;
static _Thread_local struct job *group;

static int refuse(int code, const char *why) {
    snprintf(last_error, sizeof last_error, "%s", why);
    return code;
}

static void release(struct comm *c) {
    if (atomic_fetch_sub(&c->references, 1) != 1) return;
    if (c->region) munmap(c->region, sizeof *c->region);
    if (c->fd >= 0) close(c->fd);
    free(c);
}

/* Waits a little, longer from time to time; whether to go on. */
static int pause_unless_aborted(struct comm *c, unsigned *turn) {
    if (atomic_load(&c->aborted)) return 0;
    if (++*turn < 200) sched_yield();
    else usleep(*turn < 2000 ? 20 : 200);
    return 1;
}

static int await_all(struct comm *c, int meeting, uint64_t number) {
    for (int r = 0; r < c->world; r++) {
        struct seat *seat = &c->region->seats[r];
        _Atomic uint64_t *at = meeting ? &seat->meeting : &seat->step;
        unsigned turn = 0;
        while (atomic_load(at) < number)
            if (!pause_unless_aborted(c, &turn)) return 0;
    }
    return 1;
}

/* All ranks have done what they did before; whether none has aborted. */
static int step(struct comm *c) {
    atomic_store(&c->region->seats[c->rank].step, ++c->step);
    return await_all(c, 0, c->step);
}

/* The same for what is not a stream's: forming and ending communicators. */
static int meet(struct comm *c) {
    atomic_store(&c->region->seats[c->rank].meeting, ++c->meeting);
    return await_all(c, 1, c->meeting);
}

/* --- elements --- */

static size_t size_of(int type) {
    static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return sizes[type];
}

/* Small floating-point formats: exponent and mantissa bits, and whether the largest exponent is infinity and NaN. */
struct format { int exponent, mantissa, infinity; };
static const struct format formats[] = {[F16] = {5, 10, 1}, [BF16] = {8, 7, 1}, [E4M3] = {4, 3, 0}, [E5M2] = {5, 2, 1}};

static float decode(struct format f, unsigned bits) {
    unsigned mantissa = bits & ((1u << f.mantissa) - 1), exponent = bits >> f.mantissa & ((1u << f.exponent) - 1);
    float sign = bits >> (f.exponent + f.mantissa) & 1 ? -1.0f : 1.0f;
    int bias = (1 << (f.exponent - 1)) - 1;
    unsigned top = (1u << f.exponent) - 1;
    if (f.infinity && exponent == top) return mantissa ? NAN : sign * INFINITY;
    if (!f.infinity && exponent == top && mantissa == (1u << f.mantissa) - 1) return NAN;
    if (exponent == 0) return sign * ldexpf((float)mantissa, 1 - bias - f.mantissa);
    return sign * ldexpf((float)(mantissa | 1u << f.mantissa), (int)exponent - bias - f.mantissa);
}

/* To the nearest, ties to even. */
static unsigned encode(struct format f, float x) {
    unsigned top = (1u << f.exponent) - 1, whole = 1u << f.mantissa;
    unsigned sign = signbit(x) ? 1u << (f.exponent + f.mantissa) : 0;
    unsigned infinity = top << f.mantissa, nan = f.infinity ? infinity | whole >> 1 : infinity | (whole - 1);
    int bias = (1 << (f.exponent - 1)) - 1, exponent;
    if (isnan(x)) return nan;
    if (isinf(x)) return f.infinity ? sign | infinity : nan;
    if (x == 0) return sign;
    frexpf(fabsf(x), &exponent);
    exponent = exponent - 1 < 1 - bias ? 1 - bias : exponent - 1;
    unsigned rounded = (unsigned)nearbyint(ldexp(fabs((double)x), f.mantissa - exponent));
    if (rounded == 2 * whole) rounded = whole, exponent++;
    if (rounded < whole) return sign | rounded;
    unsigned bits = (unsigned)(exponent + bias) << f.mantissa | (rounded - whole);
    if (f.infinity ? bits >= infinity : bits >= (infinity | (whole - 1))) return f.infinity ? sign | infinity : nan;
    return sign | bits;
}

static double get_float(int type, const char *at) {
    uint16_t two;
    float four;
    double eight;
    switch (type) {
    case F64: return memcpy(&eight, at, 8), eight;
    case F32: return memcpy(&four, at, 4), four;
    case F16: case BF16: return memcpy(&two, at, 2), decode(formats[type], two);
    default: return decode(formats[type], (uint8_t)*at);
    }
}

static void put_float(int type, char *at, double x) {
    float four = (float)x;
    uint16_t two;
    switch (type) {
    case F64: memcpy(at, &x, 8); break;
    case F32: memcpy(at, &four, 4); break;
    case F16: case BF16: two = (uint16_t)encode(formats[type], four), memcpy(at, &two, 2); break;
    default: *at = (char)encode(formats[type], four);
    }
}

#define COMBINE(type, a, b) \
    (op == PROD ? (type)((a) * (b)) : op == MAX ? ((a) > (b) ? (a) : (b)) : op == MIN ? ((a) < (b) ? (a) : (b)) : (type)((a) + (b)))

static uint64_t get_integer(int type, const char *at) {
    uint64_t x = 0;
    memcpy(&x, at, size_of(type));
    if (type == I8) x = (uint64_t)(int64_t)(int8_t)x;
    if (type == I32) x = (uint64_t)(int64_t)(int32_t)x;
    return x;
}

/* Element `i` of all ranks' slots, in rank order. */
static void reduce_element(struct comm *c, int type, int op, double factor, size_t i, char *to) {
    size_t at = i * size_of(type);
    if (type <= U64) {
        uint64_t sum = get_integer(type, c->region->slots[0] + at);
        for (int r = 1; r < c->world; r++) {
            uint64_t x = get_integer(type, c->region->slots[r] + at);
            int is_signed = type == I8 || type == I32 || type == I64;
            sum = is_signed && (op == MAX || op == MIN) ? (uint64_t)COMBINE(int64_t, (int64_t)sum, (int64_t)x)
                                                       : COMBINE(uint64_t, sum, x);
        }
        memcpy(to, &sum, size_of(type));
    } else if (type == F64) {
        double sum = get_float(type, c->region->slots[0] + at) * factor;
        for (int r = 1; r < c->world; r++) {
            double x = get_float(type, c->region->slots[r] + at) * factor;
            sum = COMBINE(double, sum, x);
        }
        put_float(type, to, op == AVG ? sum / c->world : sum);
    } else {
        float scale = (float)factor, sum = (float)get_float(type, c->region->slots[0] + at) * scale;
        for (int r = 1; r < c->world; r++) {
            float x = (float)get_float(type, c->region->slots[r] + at) * scale;
            sum = COMBINE(float, sum, x);
        }
        put_float(type, to, op == AVG ? sum / (float)c->world : sum);
    }
}

/* --- operations, on a stream --- */

/* Reduces `count` elements; this rank keeps those from `low` up to `high`. */
static int reduce(struct comm *c, struct operation *o, size_t count, size_t low, size_t high) {
    size_t size = size_of(o->type), piece = SLOT / size;
    for (size_t start = 0; start < count; start += piece) {
        size_t n = count - start < piece ? count - start : piece;
        memcpy(c->region->slots[c->rank], o->from + start * size, n * size);
        if (!step(c)) return 0;
        for (size_t i = 0; i < n; i++)
            if (start + i >= low && start + i < high)
                reduce_element(c, o->type, o->op, o->factor, i, o->to + (start + i - low) * size);
        if (!step(c)) return 0;
    }
    return 1;
}

/* Every rank `gives(rank)` shows its bytes to all, who take rank `r`'s to `to(r)`. */
static int show(struct comm *c, struct operation *o, int gather) {
    size_t bytes = o->count;
    for (size_t start = 0; start < bytes; start += SLOT) {
        size_t n = bytes - start < SLOT ? bytes - start : SLOT;
        if (gather || c->rank == o->peer) memcpy(c->region->slots[c->rank], o->from + start, n);
        if (!step(c)) return 0;
        for (int r = 0; r < c->world; r++)
            if (gather || r == o->peer) memcpy(o->to + (gather ? (size_t)r * bytes : 0) + start, c->region->slots[r], n);
        if (!step(c)) return 0;
    }
    return 1;
}

/* Moves what can be moved of a message; whether anything was. */
static int move(struct comm *c, struct operation *o, size_t *done) {
    struct pair *p = o->what == SEND ? &c->region->pairs[c->rank][o->peer] : &c->region->pairs[o->peer][c->rank];
    uint64_t written = atomic_load(&p->written), read = atomic_load(&p->read);
    size_t room = o->what == SEND ? PAIR - (written - read) : written - read, left = o->count - *done;
    size_t n = left < room ? left : room;
    for (size_t i = 0; i < n; i++)
        if (o->what == SEND) p->data[(written + i) % PAIR] = o->from[*done + i];
        else o->to[*done + i] = p->data[(read + i) % PAIR];
    if (n && o->what == SEND) atomic_store(&p->written, written + n);
    if (n && o->what == RECV) atomic_store(&p->read, read + n);
    *done += n;
    return n > 0;
}

/* Messages of one group, all at once; those with one peer in their order. */
static int messages(struct comm *c, struct operation *o, int count) {
    size_t *done = calloc((size_t)count + 1, sizeof *done);
    int all = 0, alive = 1;
    unsigned turn = 0;
    while (!all && alive) {
        int moved = 0;
        all = 1;
        for (int i = 0; i < count; i++) {
            if ((o[i].what != SEND && o[i].what != RECV) || done[i] == o[i].count) continue;
            all = 0;
            int behind = 0;
            for (int j = 0; j < i; j++)
                behind |= o[j].what == o[i].what && o[j].peer == o[i].peer && done[j] < o[j].count;
            if (!behind) moved |= move(c, &o[i], &done[i]);
        }
        if (moved) turn = 0;
        else if (!all) alive = pause_unless_aborted(c, &turn);
    }
    free(done);
    return alive;
}

static int perform(struct comm *c, struct operation *o) {
    size_t mine = (size_t)c->rank * o->count;
    switch (o->what) {
    case ALL_REDUCE: return reduce(c, o, o->count, 0, o->count);
    case REDUCE: return reduce(c, o, o->count, 0, c->rank == o->peer ? o->count : 0);
    case REDUCE_SCATTER: return reduce(c, o, o->count * (size_t)c->world, mine, mine + o->count);
    case BROADCAST: return show(c, o, 0);
    case ALL_GATHER: return show(c, o, 1);
    default: return 1;
    }
}

/* On the stream. */
static void run(void *argument) {
    struct job *job = argument;
    struct comm *c = job->comm;
    unsigned turn = 0;
    /* One launch at a time, in order. */
    while (atomic_load(&c->done) + 1 < job->number)
        if (!pause_unless_aborted(c, &turn)) break;
    if (job->kind == ASYNC_ERROR) atomic_store(&c->state, SYSTEM_ERROR);
    while (job->kind != NONE && pause_unless_aborted(c, &turn)) {}
    for (int i = 0; i < job->count && !atomic_load(&c->aborted); i++)
        if (!perform(c, &job->operations[i])) break;
    if (!atomic_load(&c->aborted)) messages(c, job->operations, job->count);
    atomic_fetch_add(&c->done, 1);
    free(job->operations);
    free(job);
    release(c);
}

/* --- calls --- */

static void *put_on_stream(void *argument) {
    struct job *job = argument;
    struct comm *c = job->comm;
    atomic_fetch_add(&c->references, 1);
    job->stream->enqueue(job->stream, run, job);
    int in_progress = IN_PROGRESS;
    atomic_compare_exchange_strong(&c->state, &in_progress, SUCCESS);
    release(c);
    return NULL;
}

static int detach(void *(*body)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, body, argument)) return refuse(SYSTEM_ERROR, "no thread");
    pthread_detach(thread);
    return SUCCESS;
}

static int launch(struct job *job) {
    struct comm *c = job->comm;
    job->number = ++c->launched;
    job->kind = c->at && (uint64_t)c->at == job->number ? c->kind : NONE;
    if (job->kind == LAUNCH_ERROR) {
        c->launched--;
        free(job->operations);
        free(job);
        return refuse(INVALID_USAGE, "told to refuse this call");
    }
    atomic_fetch_add(&c->references, 1);
    if (c->blocking) return put_on_stream(job), SUCCESS;
    atomic_store(&c->state, IN_PROGRESS);
    if (detach(put_on_stream, job)) return SYSTEM_ERROR;
    return IN_PROGRESS;
}

static int add(struct comm *c, struct stream *stream, struct operation o) {
    int refused = SUCCESS;
    if (!c || !stream) refused = refuse(INVALID_ARGUMENT, "no communicator or no stream");
    else if (atomic_load(&c->state) == IN_PROGRESS)
        refused = refuse(INVALID_USAGE, "a call before the last one was seen to be done");
    else if (atomic_load(&c->state) != SUCCESS) refused = refuse(INVALID_USAGE, "a call after an error");
    else if (o.peer < 0 || o.peer >= c->world) refused = refuse(INVALID_ARGUMENT, "no such rank");
    else if (o.type < 0 || o.type >= NUM_TYPES) refused = refuse(INVALID_ARGUMENT, "no such type");
    else if (o.type >= E4M3 && FAKE_VERSION < 22400) refused = refuse(INVALID_ARGUMENT, "no such type yet");
    o.factor = 1;
    if (!refused && o.op >= NUM_OPS) {
        int made = o.op - NUM_OPS;
        if (made >= MAX_SCALED || !c->in_use[made]) refused = refuse(INVALID_ARGUMENT, "no such operation");
        else o.factor = c->scaled[made], o.op = SUM;
    }
    if (refused) {
        if (depth) failed = refused;
        return refused;
    }
    if (!group) {
        group = calloc(1, sizeof *group);
        group->comm = c;
        group->stream = stream;
    }
    if (group->comm != c || group->stream != stream)
        return failed = refuse(INVALID_USAGE, "a group over several communicators or streams isn't supported here");
    group->operations = realloc(group->operations, sizeof o * (size_t)(group->count + 1));
    group->operations[group->count++] = o;
    if (depth) return SUCCESS;
    struct job *job = group;
    group = NULL;
    return launch(job);
}

int ncclGroupStart(void) { return depth++, SUCCESS; }

int ncclGroupEnd(void) {
    if (!depth) return refuse(INVALID_USAGE, "no group");
    if (--depth) return SUCCESS;
    struct job *job = group;
    int refused = failed;
    group = NULL, failed = SUCCESS;
    if (!job) return refused;
    if (!refused) return launch(job);
    free(job->operations);
    free(job);
    return refused;
}

#define OPERATION(...) add(comm, stream, (struct operation){__VA_ARGS__})

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, struct comm *comm, struct stream *stream) {
    return OPERATION(.what = ALL_REDUCE, .from = from, .to = to, .count = count, .type = type, .op = op);
}
int ncclReduce(const void *from, void *to, size_t count, int type, int op, int root, struct comm *comm, struct stream *stream) {
    return OPERATION(.what = REDUCE, .from = from, .to = to, .count = count, .type = type, .op = op, .peer = root);
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int op, struct comm *comm, struct stream *stream) {
    return OPERATION(.what = REDUCE_SCATTER, .from = from, .to = to, .count = count, .type = type, .op = op);
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, struct comm *comm, struct stream *stream) {
    return OPERATION(.what = BROADCAST, .from = from, .to = to, .count = count * size_of(type), .type = type, .peer = root);
}
int ncclAllGather(const void *from, void *to, size_t count, int type, struct comm *comm, struct stream *stream) {
    return OPERATION(.what = ALL_GATHER, .from = from, .to = to, .count = count * size_of(type), .type = type);
}
int ncclSend(const void *from, size_t count, int type, int peer, struct comm *comm, struct stream *stream) {
    return OPERATION(.what = SEND, .from = from, .count = count * size_of(type), .type = type, .peer = peer);
}
int ncclRecv(void *to, size_t count, int type, int peer, struct comm *comm, struct stream *stream) {
    return OPERATION(.what = RECV, .to = to, .count = count * size_of(type), .type = type, .peer = peer);
}

int ncclRedOpCreatePreMulSum(int *op, void *scalar, int type, int residence, struct comm *c) {
    if (residence != 1 || type < F16) return refuse(INVALID_ARGUMENT, "a factor of the host's, of a floating-point type");
    for (int i = 0; i < MAX_SCALED; i++)
        if (!c->in_use[i]) {
            c->in_use[i] = 1;
            c->scaled[i] = get_float(type, scalar);
            *op = NUM_OPS + i;
            return SUCCESS;
        }
    return refuse(INTERNAL_ERROR, "too many operations: they are to be destroyed");
}

int ncclRedOpDestroy(int op, struct comm *c) {
    int i = op - NUM_OPS;
    if (i < 0 || i >= MAX_SCALED || !c->in_use[i]) return refuse(INVALID_ARGUMENT, "no such operation");
    c->in_use[i] = 0;
    return SUCCESS;
}

int ncclGetVersion(int *version) { return *version = FAKE_VERSION, SUCCESS; }

const char *ncclGetErrorString(int code) {
    static const char *const texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
                                        "invalid argument", "invalid usage", "remote process exited", "in progress"};
    return code >= 0 && code <= IN_PROGRESS ? texts[code] : "unknown result";
}

const char *ncclGetLastError(struct comm *c) { return (void)c, last_error; }

/* --- communicators --- */

static int make_file(unique_id *id) {
    int fd = memfd_create("tensorwire-test-library", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, sizeof(struct region))) return refuse(SYSTEM_ERROR, "no shared memory"), -1;
    memset(id, 0, sizeof *id);
    snprintf(id->text, sizeof id->text, "/proc/%d/fd/%d", getpid(), fd);
    return fd;
}

int ncclGetUniqueId(unique_id *id) { return make_file(id) < 0 ? SYSTEM_ERROR : SUCCESS; }

static void told_to_fail(struct comm *c) {
    const char *text = getenv("TENSORWIRE_FAKE_NCCL");
    char kind[32];
    int rank, at;
    if (!text || sscanf(text, "%31[^@]@%d:%d", kind, &rank, &at) != 3 || rank != c->rank) return;
    c->kind = !strcmp(kind, "async_error") ? ASYNC_ERROR : !strcmp(kind, "stuck") ? STUCK
            : !strcmp(kind, "launch_error") ? LAUNCH_ERROR : !strcmp(kind, "init_never") ? INIT_NEVER : NONE;
    c->at = at;
}

static struct comm *new_comm(int rank, int world, int blocking) {
    struct comm *c = calloc(1, sizeof *c);
    c->rank = rank, c->world = world, c->blocking = blocking, c->fd = -1;
    atomic_store(&c->references, 1);
    atomic_store(&c->state, IN_PROGRESS);
    return c;
}

/* Maps the file that the id names; who made it lets go of it when all have come. */
static int open_region(struct comm *c, const unique_id *id) {
    int pid, made, fd = open(id->text, O_RDWR | O_CLOEXEC);
    if (fd < 0) return refuse(SYSTEM_ERROR, "the id names no file");
    c->region = mmap(NULL, sizeof *c->region, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (c->region == MAP_FAILED) return c->region = NULL, refuse(SYSTEM_ERROR, "no memory");
    if (c->rank == 0 && sscanf(id->text, "/proc/%d/fd/%d", &pid, &made) == 2 && pid == getpid()) c->fd = made;
    return SUCCESS;
}

static void join(struct comm *c) {
    unsigned turn = 0;
    if (c->kind != INIT_NEVER) atomic_fetch_add(&c->region->arrived, 1);
    while (c->kind == INIT_NEVER || (int)atomic_load(&c->region->arrived) < c->world)
        if (!pause_unless_aborted(c, &turn)) return;
    if (c->fd >= 0) close(c->fd), c->fd = -1;
    atomic_store(&c->state, SUCCESS);
}

static void *join_meanwhile(void *argument) {
    join(argument);
    release(argument);
    return NULL;
}

static int check_config(const config *given) {
    if (given->size < sizeof(config) || given->magic != 0xcafebeef || given->version < 21400)
        return refuse(INVALID_ARGUMENT, "a configuration that isn't initialised");
    if (given->blocking != 0 && given->blocking != 1) return refuse(INVALID_ARGUMENT, "blocking is 0 or 1");
    if (given->min_ctas != INT_MIN || given->net_name) return refuse(INVALID_ARGUMENT, "what nobody set is set");
    return SUCCESS;
}

int ncclCommInitRankConfig(struct comm **to, int world, unique_id id, int rank, config *given) {
    int refused = check_config(given);
    if (refused) return refused;
    if (world < 1 || world > MAX_WORLD || rank < 0 || rank >= world) return refuse(INVALID_ARGUMENT, "no such rank");
    struct comm *c = *to = new_comm(rank, world, given->blocking);
    told_to_fail(c);
    if ((refused = open_region(c, &id))) return atomic_store(&c->state, refused), refused;
    if (c->blocking) return join(c), SUCCESS;
    atomic_fetch_add(&c->references, 1);
    return detach(join_meanwhile, c) ? SYSTEM_ERROR : IN_PROGRESS;
}

#ifndef FAKE_NO_SPLIT
struct split { struct comm *parent, **to; int color, key, blocking; };
struct said { int color, key; unique_id id; };

static int form(struct split *s) {
    struct comm *c = s->parent;
    struct said *mine = (struct said *)c->region->seats[c->rank].said;
    mine->color = s->color, mine->key = s->key;
    if (!meet(c)) return 0;
    int rank = 0, world = 0, first = -1, fd = -1;
    struct said *others[MAX_WORLD];
    for (int r = 0; r < c->world; r++) {
        struct said *other = others[r] = (struct said *)c->region->seats[r].said;
        if (other->color != s->color) continue;
        world++;
        rank += other->key < s->key || (other->key == s->key && r < c->rank);
        if (first < 0 || other->key < others[first]->key) first = r;
    }
    if (s->color >= 0 && first == c->rank) fd = make_file(&mine->id);
    if (!meet(c)) return 0;
    if (s->color >= 0) {
        struct comm *child = new_comm(rank, world, s->blocking);
        if (open_region(child, &others[first]->id)) return 0;
        if (rank == 0) child->fd = fd;
        *s->to = child;
        atomic_fetch_add(&child->references, 1);
        if (detach(join_meanwhile, child)) return 0;
    }
    return meet(c);
}

static void *split_meanwhile(void *argument) {
    struct split *s = argument;
    int formed = form(s);
    atomic_store(&s->parent->state, formed ? SUCCESS : INTERNAL_ERROR);
    release(s->parent);
    free(s);
    return NULL;
}

int ncclCommSplit(struct comm *c, int color, int key, struct comm **to, config *given) {
    int refused = check_config(given);
    if (refused) return refused;
    if (color < -1) return refuse(INVALID_ARGUMENT, "a color below -1");
    if (atomic_load(&c->state) != SUCCESS) return refuse(INVALID_USAGE, "a call before the last one was seen to be done");
    struct split *s = calloc(1, sizeof *s);
    *s = (struct split){c, to, color, key, given->blocking};
    *to = NULL;
    atomic_store(&c->state, IN_PROGRESS);
    atomic_fetch_add(&c->references, 1);
    return detach(split_meanwhile, s) ? SYSTEM_ERROR : IN_PROGRESS;
}
#endif

static void *finalize_meanwhile(void *argument) {
    struct comm *c = argument;
    unsigned turn = 0;
    int alive = 1;
    while (alive && atomic_load(&c->done) < c->launched) alive = pause_unless_aborted(c, &turn);
    if (alive && meet(c)) atomic_store(&c->state, SUCCESS);
    release(c);
    return NULL;
}

int ncclCommFinalize(struct comm *c) {
    if (atomic_load(&c->state) != SUCCESS) return refuse(INVALID_USAGE, "it isn't ready");
    atomic_store(&c->state, IN_PROGRESS);
    atomic_fetch_add(&c->references, 1);
    return detach(finalize_meanwhile, c) ? SYSTEM_ERROR : IN_PROGRESS;
}

int ncclCommDestroy(struct comm *c) { return release(c), SUCCESS; }

int ncclCommAbort(struct comm *c) {
    atomic_store(&c->aborted, 1);
    release(c);
    return SUCCESS;
}

int ncclCommGetAsyncError(struct comm *c, int *error) { return *error = atomic_load(&c->state), SUCCESS; }

#ifndef FAKE_NO_REGISTER
int ncclMemAlloc(void **to, size_t bytes) {
    *to = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return *to ? SUCCESS : refuse(SYSTEM_ERROR, "no memory");
}

int ncclMemFree(void *at) { return free(at), SUCCESS; }

int ncclCommRegister(struct comm *c, void *at, size_t bytes, void **handle) {
    if (!at || !bytes) return refuse(INVALID_ARGUMENT, "nothing to register");
    c->registered++;
    *handle = at;
    return SUCCESS;
}

int ncclCommDeregister(struct comm *c, void *handle) {
    if (!handle || !c->registered) return refuse(INVALID_ARGUMENT, "nothing is registered");
    c->registered--;
    return SUCCESS;
}
#endif
