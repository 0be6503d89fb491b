/* Collectives and messages between the ranks of one host, over memory that they share. No torch and no Python in it:
 * shm.py maps the segment, calls these functions (shm_module.c) and keeps the tensors alive.
 *
 * Every rank has a counter of phases. In a phase a rank waits until the others have ended the one before, writes a chunk
 * into memory of its own, reads what they wrote in the phase before, and raises its counter. All ranks run the same
 * phases in the same order, so one number says everything: whoever has raised its counter twice since has read the chunk.
 * Chunks follow each other round a ring, which all ranks go round alike: to write a line anew that still lies in another
 * core's second-level cache takes several times as long as one that has gone from there.
 * Nothing blocks inside an operation: `advance` goes as far as the others let it and is called again, by the thread that
 * waits for the result or by a helper thread when nobody does. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kernel.h"

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

enum { LINE = 64, SLOTS = 32, HEADER = 128, NEAR = 2048, RING = 3, BLOCK = 1024, WHY = 960 }; /* RING: in chunks */
enum { SMALL = 1 << 15, SMALL_OF_TWO = 1 << 18 }; /* bytes up to which every rank reads every other's chunk */
enum { COPIED = 1 << 18, STEP = 1 << 16 };    /* bytes of a chunk that is only copied, of a step of a message */
enum { STRIDE = 512 };                        /* bytes after which a large all-reduce goes over to its next stream */
enum { SPIN_NS = 1000000, TURNS = 16, YIELD_NS = 100000, NAP_NS = 5000000, HELP_AFTER_NS = 1000000, LINGER = 20 };
enum kind { BARRIER, ALL_REDUCE, REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER, GATHER, SCATTER, ALL_TO_ALL, SEND, RECV };
enum dtype { F32, F64, BF16, F16, I8, U8, I16, I32, I64, BOOL };
enum reduction { SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR };
enum { OK = 0, AGAIN = 1, FAILED = 2 };

static const char *KINDS[] = {"barrier", "all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter",
                              "gather", "scatter", "all_to_all", "send", "recv"};
static const char *DTYPES[] = {"float32", "float64", "bfloat16", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"};
static const char *REDUCTIONS[] = {"sum", "avg", "product", "min", "max", "band", "bor", "bxor"};
static const size_t WIDTH[] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 1};

typedef struct {                              /* one a rank; what others poll lies apart, for prefetchers' sake */
    _Alignas(4 * LINE) _Atomic uint64_t count; /* phases that it has ended */
    _Alignas(4 * LINE) _Atomic uint32_t bell; /* the futex that its threads sleep on */
    _Atomic uint32_t sleepers;
    _Atomic uint32_t left;                    /* it ended without an error */
} Line;

typedef struct {                              /* the head of the segment */
    _Alignas(LINE) _Atomic uint32_t failed;   /* 1 while `why` is written, 2 once it can be read */
    char why[WHY];
} Head;

typedef struct {                              /* with every chunk: what its writer believes is going on */
    uint64_t serial, bytes, most;
    int64_t heap;                             /* where its tensor lies in its heap, or -1 */
    uint32_t kind, dtype, reduction, root;
} Said;

typedef struct {                              /* a stream of messages from one rank to another */
    _Alignas(LINE) _Atomic uint64_t written;
    _Alignas(LINE) _Atomic uint64_t read;
} Pipe;

struct Op {
    uint32_t kind, dtype, reduction, root;
    uint64_t serial, bytes, most;             /* bytes: of one rank's tensor; most: of the largest piece */
    uint64_t first, k, phases, chunk;
    int split, shared;
    char **in, **out;                         /* by rank, where the operation has pieces */
    uint64_t *in_bytes, *out_bytes;           /* one after the other */
    int64_t peer, tag;                        /* of a message */
    uint64_t done_bytes;
    int framed;
    _Atomic int done;
    struct Op *next;
};

typedef struct { int64_t tag; uint64_t bytes; char rest[48]; } Frame; /* a line, so that what follows begins on one */

typedef struct Kept { Frame frame; char *data; struct Kept *next; } Kept; /* a message that nobody asked for yet */

typedef struct { int active; Frame frame; uint64_t got; Op *op; char *data; } Incoming; /* a message half read */

struct Context {
    int rank, n, crowded;
    char *base, *heaps;
    uint64_t chunk, pipe, heap;
    Head *head;
    Line *lines;
    int *names, *watched;
    pthread_mutex_t lock, door;               /* who goes on with operations; who posts one */
    Op *posted, **end;                        /* not yet looked at by whoever goes on */
    Op *queue, *tail;                         /* collectives, in order */
    Op **sends, *receives;                    /* messages, by order of posting */
    Incoming *incoming;
    Kept **kept;
    uint64_t phase, serial, at[SLOTS], ring;  /* at: where every rank has its data of the last phases, from its slots on */
    int messages;                             /* whether there ever were any */
    _Atomic int news, open, waiting, closing, asleep;
    pthread_t helper;
    _Atomic int helped;
};

/* ---- copies and reductions --------------------------------------------------------------------------------------- */

/* Unlike memcpy, which turns to `rep movsb` for what is large: where the two places lie a little apart in their pages
 * that is several times slower (glibc bug 30994). */
typedef uint64_t Vector __attribute__((vector_size(LINE), aligned(1), may_alias));
WIDE static void copy(void *to, const void *from, size_t bytes) {
    size_t at = 0;
    for (; at + 4 * LINE <= bytes; at += 4 * LINE) {
        Vector *t = (Vector *)((char *)to + at);
        const Vector *f = (const Vector *)((const char *)from + at);
        Vector a = f[0], b = f[1], c = f[2], d = f[3];
        t[0] = a; t[1] = b; t[2] = c; t[3] = d;
    }
    memcpy((char *)to + at, (const char *)from + at, bytes - at);
}

static inline float from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu, u;
    float f;
    if (rest >= 0x7c00u) u = 0x7f800000u | (rest & 0x3ffu) << 13;
    else if (rest >= 0x400u) u = (rest + 0x1c000u) << 13;
    else { f = (float)rest * 0x1p-24f; memcpy(&u, &f, 4); }
    u |= sign; memcpy(&f, &u, 4);
    return f;
}
static inline uint16_t to_f16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (rest >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);
    if (rest < 0x38800000u) {                 /* subnormal: adding 0.5 lets the unit round it */
        float g; memcpy(&g, &rest, 4); g += 0.5f; memcpy(&rest, &g, 4);
        return (uint16_t)(sign | (rest - 0x3f000000u));
    }
    return (uint16_t)(sign | ((rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13));
}
#define SAME(x) (x)
#define TRUTH(x) ((x) != 0)

#define REDUCER(NAME, T, ACC, LOADER, STORER, BITS)                                                                    \
    WIDE static void NAME(char *dst, char **src, int ns, size_t count, int op) {                                       \
        typedef ACC A;                                                                                                 \
        A acc[BLOCK];                                                                                                  \
        if (ns == 2 && op == SUM) {                                                                                    \
            const T *a = (const T *)src[0], *b = (const T *)src[1];                                                    \
            T *d = (T *)dst;                                                                                           \
            _Pragma("GCC ivdep")                                                                                       \
            for (size_t i = 0; i < count; i++) d[i] = STORER((A)(LOADER(a[i]) + LOADER(b[i])));                        \
            return;                                                                                                    \
        }                                                                                                              \
        for (size_t at = 0; at < count; at += BLOCK) {                                                                 \
            size_t m = count - at < BLOCK ? count - at : BLOCK;                                                        \
            const T *s = (const T *)src[0] + at;                                                                       \
            for (size_t i = 0; i < m; i++) acc[i] = LOADER(s[i]);                                                      \
            for (int j = 1; j < ns; j++) {                                                                             \
                s = (const T *)src[j] + at;                                                                            \
                switch (op) {                                                                                          \
                case SUM: case AVG: for (size_t i = 0; i < m; i++) acc[i] = (A)(acc[i] + LOADER(s[i])); break;         \
                case PRODUCT: for (size_t i = 0; i < m; i++) acc[i] = (A)(acc[i] * LOADER(s[i])); break;               \
                case MIN: for (size_t i = 0; i < m; i++) { A b = LOADER(s[i]); acc[i] = b < acc[i] || b != b ? b : acc[i]; } break; \
                case MAX: for (size_t i = 0; i < m; i++) { A b = LOADER(s[i]); acc[i] = b > acc[i] || b != b ? b : acc[i]; } break; \
                BITS                                                                                                   \
                }                                                                                                      \
            }                                                                                                          \
            if (op == AVG) for (size_t i = 0; i < m; i++) acc[i] = (A)(acc[i] / (A)ns);                                \
            T *d = (T *)dst + at;                                                                                      \
            for (size_t i = 0; i < m; i++) d[i] = STORER(acc[i]);                                                      \
        }                                                                                                              \
    }
#define BITWISE(LOADER)                                                                                                \
    case BAND: for (size_t i = 0; i < m; i++) acc[i] = (A)(acc[i] & LOADER(s[i])); break;                              \
    case BOR: for (size_t i = 0; i < m; i++) acc[i] = (A)(acc[i] | LOADER(s[i])); break;                               \
    case BXOR: for (size_t i = 0; i < m; i++) acc[i] = (A)(acc[i] ^ LOADER(s[i])); break;

REDUCER(reduce_f32, float, float, SAME, SAME, )
REDUCER(reduce_f64, double, double, SAME, SAME, )
REDUCER(reduce_bf16, uint16_t, float, from_bf16, to_bf16, )
REDUCER(reduce_f16, uint16_t, float, from_f16, to_f16, )
REDUCER(reduce_i8, int8_t, int8_t, SAME, SAME, BITWISE(SAME))
REDUCER(reduce_u8, uint8_t, uint8_t, SAME, SAME, BITWISE(SAME))
REDUCER(reduce_i16, int16_t, int16_t, SAME, SAME, BITWISE(SAME))
REDUCER(reduce_i32, int32_t, int32_t, SAME, SAME, BITWISE(SAME))
REDUCER(reduce_i64, int64_t, int64_t, SAME, SAME, BITWISE(SAME))
REDUCER(reduce_bool, uint8_t, uint8_t, TRUTH, TRUTH, BITWISE(TRUTH))

typedef void (*Reduce)(char *, char **, int, size_t, int);
static const Reduce REDUCERS[] = {reduce_f32, reduce_f64, reduce_bf16, reduce_f16, reduce_i8,
                                  reduce_u8, reduce_i16, reduce_i32, reduce_i64, reduce_bool};

/* dst = the reduction of src[0..ns), in that order; `bytes` of each. dst may be one of them. */
void shm_reduce(char *dst, char **src, int ns, uint64_t bytes, int dtype, int reduction) {
    REDUCERS[dtype](dst, src, ns, bytes / WIDTH[dtype], reduction);
}

/* ---- the segment ------------------------------------------------------------------------------------------------- */

static uint64_t rounded(uint64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }
static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t pieces(uint64_t bytes, uint64_t chunk) { return bytes ? (bytes + chunk - 1) / chunk : 1; }

static uint64_t slots_at(int n) { return sizeof(Head) + (uint64_t)n * sizeof(Line); }
static uint64_t room(uint64_t chunk) { return SLOTS * (HEADER + NEAR) + RING * chunk; } /* of one rank */
static uint64_t pipes_at(int n, uint64_t chunk) { return slots_at(n) + (uint64_t)n * room(chunk); }

/* Bytes of the segment before the heaps: head, counters, slots and rings, pipes. `chunk` and `pipe` are multiples of 64. */
uint64_t shm_fixed(int n, uint64_t chunk, uint64_t pipe) {
    uint64_t end = pipes_at(n, chunk) + (uint64_t)n * n * (sizeof(Pipe) + pipe);
    return (end + 65535) / 65536 * 65536; /* the largest page there is */
}

static char *slots(Context *c, int rank) { return c->base + slots_at(c->n) + (uint64_t)rank * room(c->chunk); }
static Said *said(Context *c, int rank, uint64_t phase) { return (Said *)(slots(c, rank) + phase % SLOTS * (HEADER + NEAR)); }
static char *data(Context *c, int rank, uint64_t phase) { return slots(c, rank) + c->at[phase % SLOTS]; }
static Pipe *pipe_of(Context *c, int from, int to) {
    return (Pipe *)(c->base + pipes_at(c->n, c->chunk) + ((uint64_t)from * c->n + to) * (sizeof(Pipe) + c->pipe));
}
static char *in_heap(Context *c, int rank, int64_t offset) { return c->heaps + (uint64_t)rank * c->heap + offset; }

/* ---- bells and failure ------------------------------------------------------------------------------------------- */

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
static void nap(_Atomic uint32_t *word, uint32_t seen, int64_t ns) {
    struct timespec t = {ns / 1000000000, ns % 1000000000};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0);
}
static void ring(Context *c, int rank) {
    Line *l = &c->lines[rank];
    if (atomic_load(&l->sleepers)) {
        atomic_fetch_add(&l->bell, 1);
        syscall(SYS_futex, &l->bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}
static void ring_others(Context *c) {
    for (int r = 0; r < c->n; r++)
        if (r != c->rank) ring(c, r);
}

/* The first failure of the group is everybody's: all that wait return, and nothing runs any more. */
__attribute__((format(printf, 2, 3))) static void fail(Context *c, const char *format, ...) {
    uint32_t none = 0;
    if (atomic_compare_exchange_strong(&c->head->failed, &none, 1)) {
        va_list values;
        va_start(values, format);
        vsnprintf(c->head->why, WHY, format, values);
        va_end(values);
        atomic_store(&c->head->failed, 2);
    }
    for (int r = 0; r < c->n; r++) {
        atomic_fetch_add(&c->lines[r].bell, 1);
        syscall(SYS_futex, &c->lines[r].bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}
static int broken(Context *c) { return atomic_load_explicit(&c->head->failed, memory_order_relaxed) != 0; }

void shm_abort(Context *c, const char *why) { fail(c, "%s", why); }

/* Copies why the group failed; returns its length, 0 if it has not. */
int shm_why(Context *c, char *text, int room) {
    int64_t limit = now_ns() + 100000000; /* whoever writes it may have been killed while it did */
    while (atomic_load(&c->head->failed) == 1 && now_ns() < limit) sched_yield();
    if (!broken(c)) return 0;
    snprintf(text, room, "%s", atomic_load(&c->head->failed) == 2 ? c->head->why : "a rank failed, and died before it said why");
    return (int)strlen(text);
}

/* A process that is being killed says so in its flags before it gives back its memory, which may take seconds. */
static int dead(Context *c, int rank) {
    char text[512];
    if (rank == c->rank || c->watched[rank] < 0) return 0;
    ssize_t got = pread(c->watched[rank], text, sizeof text - 1, 0);
    if (got <= 0) return got == 0 || errno == ESRCH;
    text[got] = 0;
    char *rest = strrchr(text, ')');
    char state;
    unsigned flags;
    if (!rest || sscanf(rest + 1, " %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2) return 0;
    return state == 'Z' || state == 'X' || (flags & 4u) != 0;
}
/* Whether `o` waits for something that `rank` has not sent. */
static int held_up_by(Context *c, Op *o, int rank) {
    if (o->kind == SEND || o->kind == RECV) return o->peer == rank;
    return atomic_load(&c->lines[rank].count) < atomic_load(&c->lines[c->rank].count);
}
/* The rank that `o` waits for in vain because it left, or -1; a message from anybody needs only one that is there. */
static int gone(Context *c, Op *o) {
    int found = -1, present = 0;
    for (int r = 0; r < c->n; r++) {
        if (r == c->rank) continue;
        if (!atomic_load(&c->lines[r].left)) present++;
        else if (found < 0 && (o->peer < 0 || held_up_by(c, o, r))) found = r;
    }
    return o->peer < 0 && present ? -1 : found;
}
static int first_dead(Context *c) {
    for (int r = 0; r < c->n; r++)
        if (!atomic_load(&c->lines[r].left) && dead(c, r)) return r;
    return -1;
}
/* ---- collectives ------------------------------------------------------------------------------------------------- */

static int reached(Context *c, int rank, uint64_t count) {
    return atomic_load_explicit(&c->lines[rank].count, memory_order_acquire) >= count;
}
static int all_reached(Context *c, uint64_t count) {
    for (int r = 0; r < c->n; r++)
        if (r != c->rank && !reached(c, r, count)) return 0;
    return 1;
}

/* Whether this rank reads from `rank` in the phases of `o`. */
static int needs(Context *c, Op *o, int rank) {
    if (rank == c->rank) return 0;
    switch (o->kind) {
    case REDUCE: case GATHER: return (int)o->root == c->rank;
    case BROADCAST: case SCATTER: return (int)o->root == rank;
    default: return 1;
    }
}
static int needed_reached(Context *c, Op *o, uint64_t count) {
    for (int r = 0; r < c->n; r++)
        if (needs(c, o, r) && !reached(c, r, count)) return 0;
    return 1;
}

static uint64_t part(Op *o, uint64_t bytes, uint64_t k) { /* bytes of chunk k of a piece of `bytes` */
    uint64_t from = k * o->chunk;
    return from >= bytes ? 0 : smaller(o->chunk, bytes - from);
}
static uint64_t share(uint64_t bytes, int n) { return rounded((bytes + n - 1) / n); } /* of one rank, of n */
static int rooted(uint32_t kind) { return kind == REDUCE || kind == BROADCAST || kind == GATHER || kind == SCATTER; }
static int is_root(Context *c, Op *o) { return (int)o->root == c->rank; }

static void keep_own(Context *c, Op *o) { /* what a rank sends to itself */
    char *from = o->in[0], *to = o->out[0];
    uint64_t bytes = o->bytes;
    if ((o->kind == GATHER || o->kind == SCATTER) && !is_root(c, o)) return;
    switch (o->kind) {
    case GATHER: case ALL_GATHER: to = o->out[c->rank]; break;
    case SCATTER: from = o->in[c->rank]; break;
    case ALL_TO_ALL: from = o->in[c->rank]; to = o->out[c->rank]; bytes = o->in_bytes[c->rank]; break;
    default: return;
    }
    if (from == to || !bytes) return;
    if (from + bytes <= to || to + bytes <= from) copy(to, from, bytes); else memmove(to, from, bytes);
}

/* In front of each chunk of an all-to-all: what a rank sends to each, and expects from each. */
static uint64_t sizes(Context *c) { return rounded(2 * c->n * sizeof(uint64_t)); }

static void begin(Context *c, Op *o) {
    uint64_t cut = c->chunk / c->n / LINE * LINE;
    keep_own(c, o);
    o->first = c->phase;
    o->chunk = smaller(c->chunk, COPIED);
    o->phases = 1;
    switch (o->kind) {
    case BARRIER: return;
    case ALL_REDUCE:
        o->split = o->bytes > (c->n > 2 ? SMALL : SMALL_OF_TWO);
        if (o->split) o->chunk = c->n * share(o->bytes, c->n * (int)pieces(o->bytes, c->n * cut)); /* as even as can be */
        o->phases = pieces(o->bytes, o->chunk) + o->split;
        return;
    case REDUCE: case BROADCAST: case GATHER: o->phases = pieces(o->bytes, o->chunk); return;
    case ALL_GATHER: o->phases = pieces(o->most, o->chunk); return;
    case REDUCE_SCATTER: case SCATTER:
        o->chunk = smaller(smaller(cut, COPIED), rounded(o->bytes));
        o->phases = pieces(o->bytes, o->chunk);
        return;
    case ALL_TO_ALL: o->chunk = smaller((c->chunk - sizes(c)) / c->n / LINE * LINE, COPIED); return; /* `learn` */
    }
}

static int64_t placed(Context *c, Op *o) { /* where the tensor of a large all-reduce lies in this rank's heap, or -1 */
    int64_t heap = o->split && o->in[0] == o->out[0] ? o->in[0] - in_heap(c, c->rank, 0) : -1;
    return heap >= 0 && (uint64_t)heap < c->heap ? heap : -1;
}

/* A large all-reduce: of each chunk every rank sums one piece and the others copy it. Three chunks are under way: in
 * phase k a rank writes its part of the others' pieces of chunk k, sums its own piece of chunk k - 1, and copies the
 * others' sums of chunk k - 2; by turns, so that none of them waits for memory alone. In a rank's chunk its own piece
 * has the place that nothing else needs. */
typedef struct { uint64_t from, bytes; } Piece;
static Piece piece(Context *c, Op *o, uint64_t k, int r) {
    uint64_t each = o->chunk / c->n, from = k * o->chunk + r * each;
    return (Piece){from, k >= o->phases || from >= o->bytes ? 0 : smaller(each, o->bytes - from)};
}
static uint64_t stretch(Piece p, uint64_t at) { return at >= p.bytes ? 0 : smaller(STRIDE, p.bytes - at); }

static void split(Context *c, Op *o, uint64_t phase) {
    uint64_t each = o->chunk / c->n, n;
    char *mine = data(c, c->rank, phase), *in = o->in[0], *out = o->out[0], *src[c->n], *now[c->n];
    Piece own = piece(c, o, o->k - 1, c->rank), goes[c->n], comes[c->n];
    for (int r = 0; r < c->n; r++) {
        int64_t heap = o->k == 1 ? said(c, r, phase - 1)->heap : -1; /* of chunk 0 it wrote nothing: it is to be read there */
        goes[r] = comes[r] = (Piece){0, 0};
        if (r != c->rank && (o->k || placed(c, o) < 0)) goes[r] = piece(c, o, o->k, r);
        if (r != c->rank) comes[r] = piece(c, o, o->k - 2, r);
        src[r] = r == c->rank ? in + own.from : heap >= 0 ? in_heap(c, r, heap) + own.from : data(c, r, phase - 1) + c->rank * each;
    }
    for (uint64_t at = 0; at < each; at += STRIDE) {
        for (int r = 0; r < c->n; r++)
            if ((n = stretch(goes[r], at))) copy(mine + r * each + at, in + goes[r].from + at, n);
        if ((n = stretch(own, at))) {
            for (int r = 0; r < c->n; r++) now[r] = src[r] + at;
            shm_reduce(out + own.from + at, now, c->n, n, o->dtype, o->reduction);
            copy(mine + c->rank * each + at, out + own.from + at, n);
        }
        for (int r = 0; r < c->n; r++)
            if ((n = stretch(comes[r], at))) copy(out + comes[r].from + at, data(c, r, phase - 1) + r * each + at, n);
    }
}

/* All tensors lie in the heaps: every rank sums one piece of all of them and writes it into all of them. */
static void reduce_shared(Context *c, Op *o, uint64_t phase) {
    uint64_t each = share(o->bytes, c->n), from = smaller(each * c->rank, o->bytes), bytes = smaller(each, o->bytes - from);
    char *all[c->n];
    for (int r = 0; r < c->n; r++) all[r] = in_heap(c, r, said(c, r, phase)->heap) + from;
    for (uint64_t n; bytes; bytes -= n) {
        n = smaller(STRIDE, bytes);
        shm_reduce(all[c->rank], all, c->n, n, o->dtype, o->reduction);
        for (int r = 0; r < c->n; r++)
            if (r != c->rank) copy(all[r], all[c->rank], n);
        for (int r = 0; r < c->n; r++) all[r] += n;
    }
}

/* Bytes that a rank writes at most in phase k of `o`, the same for all ranks. */
static uint64_t written(Context *c, Op *o) {
    switch (o->kind) {
    case BARRIER: return 0;
    case ALL_REDUCE: return o->split ? o->chunk : part(o, o->bytes, o->k);
    case ALL_GATHER: return part(o, o->most, o->k);
    case REDUCE_SCATTER: case SCATTER: return c->n * o->chunk;
    case ALL_TO_ALL: return sizes(c) + c->n * o->chunk;
    default: return part(o, o->bytes, o->k);
    }
}
/* What is small lies beside what is said of it, in one of many slots, so that ranks that wait for nobody (the root of a
 * broadcast) run ahead of those that read. The next place in the ring may only never overlap that of the phase before. */
static int beside(Context *c, Op *o) { return written(c, o) <= NEAR; }
static uint64_t readers(Context *c, Op *o, uint64_t phase) { /* how far all must have come before the first phase writes */
    return !beside(c, o) ? phase : phase < SLOTS - 2 ? 0 : phase - (SLOTS - 2);
}
static void place(Context *c, Op *o, uint64_t phase) {
    uint64_t bytes = written(c, o), *at = &c->at[phase % SLOTS];
    if (beside(c, o)) { *at = phase % SLOTS * (HEADER + NEAR) + HEADER; return; }
    if (c->ring + bytes > RING * c->chunk) c->ring = 0;
    *at = SLOTS * (HEADER + NEAR) + c->ring;
    c->ring += rounded(bytes);
}

static void put(Context *c, Op *o, uint64_t phase) {
    char *to = data(c, c->rank, phase);
    uint64_t at = o->k * o->chunk;
    switch (o->kind) {
    case ALL_REDUCE:
        if (o->split) {
            if (!o->shared) split(c, o, phase);
            return;
        }
        /* fall through */
    case REDUCE: case GATHER:
        if (o->kind == ALL_REDUCE || !is_root(c, o)) copy(to, o->in[0] + at, part(o, o->bytes, o->k));
        return;
    case BROADCAST:
        if (is_root(c, o)) copy(to, o->in[0] + at, part(o, o->bytes, o->k));
        return;
    case ALL_GATHER:
        if (at < o->in_bytes[c->rank]) copy(to, o->in[0] + at, part(o, o->in_bytes[c->rank], o->k));
        return;
    case SCATTER:
        if (!is_root(c, o)) return;
        /* fall through */
    case REDUCE_SCATTER:
        for (int r = 0; r < c->n; r++)
            if (r != c->rank) copy(to + r * o->chunk, o->in[r] + at, part(o, o->bytes, o->k));
        return;
    case ALL_TO_ALL:
        if (o->k == 0) copy(to, o->in_bytes, 2 * c->n * sizeof *o->in_bytes); /* and out_bytes */
        for (int r = 0; r < c->n; r++)
            if (r != c->rank && at < o->in_bytes[r]) copy(to + sizes(c) + r * o->chunk, o->in[r] + at, part(o, o->in_bytes[r], o->k));
        return;
    }
}

static void reduce_slots(Context *c, Op *o, uint64_t k, uint64_t phase, char *mine, uint64_t offset) {
    char *src[c->n];
    for (int r = 0; r < c->n; r++) src[r] = r == c->rank ? mine : data(c, r, phase) + offset;
    shm_reduce(o->out[0] + k * o->chunk, src, c->n, part(o, o->bytes, k), o->dtype, o->reduction);
}

static void get(Context *c, Op *o, uint64_t k, uint64_t phase) { /* what was written in `phase`, which was phase k */
    uint64_t at = k * o->chunk;
    switch (o->kind) {
    case ALL_REDUCE:
        if (o->shared) { if (k == 0) reduce_shared(c, o, phase); }
        else if (!o->split) reduce_slots(c, o, k, phase, o->in[0] + at, 0);
        return;
    case REDUCE:
        if (is_root(c, o)) reduce_slots(c, o, k, phase, o->in[0] + at, 0);
        return;
    case BROADCAST:
        if (!is_root(c, o)) copy(o->out[0] + at, data(c, o->root, phase), part(o, o->bytes, k));
        return;
    case GATHER:
        for (int r = 0; r < c->n && is_root(c, o); r++)
            if (r != c->rank) copy(o->out[r] + at, data(c, r, phase), part(o, o->bytes, k));
        return;
    case ALL_GATHER:
        for (int r = 0; r < c->n; r++)
            if (r != c->rank && at < o->out_bytes[r]) copy(o->out[r] + at, data(c, r, phase), part(o, o->out_bytes[r], k));
        return;
    case SCATTER:
        if (!is_root(c, o)) copy(o->out[0] + at, data(c, o->root, phase) + c->rank * o->chunk, part(o, o->bytes, k));
        return;
    case REDUCE_SCATTER: reduce_slots(c, o, k, phase, o->in[c->rank] + at, c->rank * o->chunk); return;
    case ALL_TO_ALL:
        for (int r = 0; r < c->n; r++)
            if (r != c->rank && at < o->out_bytes[r])
                copy(o->out[r] + at, data(c, r, phase) + sizes(c) + c->rank * o->chunk, part(o, o->out_bytes[r], k));
        return;
    }
}

static void say(Context *c, Op *o, uint64_t phase) {
    uint64_t mine = o->kind == ALL_GATHER ? o->in_bytes[c->rank] : o->bytes;
    *said(c, c->rank, phase) = (Said){o->serial, mine, o->most, placed(c, o), o->kind, o->dtype, o->reduction, o->root};
}

/* The first phase is over: what the others said decides how many follow. */
static void learn(Context *c, Op *o, uint64_t phase) {
    if (o->split) {
        o->shared = 1;
        for (int r = 0; r < c->n; r++) o->shared = o->shared && said(c, r, phase)->heap >= 0;
        if (o->shared) o->phases = 2;
    }
    if (o->kind == ALL_TO_ALL)
        for (int r = 0; r < c->n; r++) {
            uint64_t needed = pieces(said(c, r, phase)->most, o->chunk);
            if (needed > o->phases) o->phases = needed;
        }
}

static int reduces(uint32_t kind) { return kind == ALL_REDUCE || kind == REDUCE || kind == REDUCE_SCATTER; }

static void describe(char *text, size_t room, const Said *s) {
    if (s->kind == BARRIER) { snprintf(text, room, "a barrier"); return; }
    int n = snprintf(text, room, "%s of %llu %s", KINDS[s->kind], (unsigned long long)(s->bytes / WIDTH[s->dtype]), DTYPES[s->dtype]);
    if (reduces(s->kind)) n += snprintf(text + n, room - n, " by %s", REDUCTIONS[s->reduction]);
    if (rooted(s->kind)) snprintf(text + n, room - n, " with root %u", s->root);
}

/* `expected` are the bytes that each rank of an all-gather brings; elsewhere all bring alike. */
static int disagree(const Said *mine, const Said *theirs, const uint64_t *expected, int rank) {
    if (mine->kind != theirs->kind || mine->serial != theirs->serial) return 1;
    if (mine->kind == BARRIER) return 0;
    if (mine->dtype != theirs->dtype || mine->root != theirs->root) return 1;
    if (reduces(mine->kind) && mine->reduction != theirs->reduction) return 1;
    if (mine->kind == ALL_TO_ALL) return 0;
    return theirs->bytes != (expected ? expected[rank] : mine->bytes);
}

/* Ranks that do different things would read each other's bytes as something else: they are told, by name. */
static int same_call(Context *c, int rank, uint64_t phase, const uint64_t *expected) {
    const Said *mine = said(c, c->rank, phase), *theirs = said(c, rank, phase);
    char here[160], there[160];
    if (!disagree(mine, theirs, expected, rank)) return 1;
    describe(here, sizeof here, mine);
    describe(there, sizeof there, theirs);
    fail(c, "rank %d called %s where rank %d called %s (operation number %llu of this group)", c->names[c->rank], here,
         c->names[rank], there, (unsigned long long)mine->serial);
    return 0;
}
static int same_size(Context *c, Op *o, int rank, uint64_t phase) {
    if (o->kind != ALL_TO_ALL) return 1;
    const uint64_t *sends = (const uint64_t *)data(c, rank, phase), *expects = sends + c->n;
    int from = sends[c->rank] != o->out_bytes[rank] ? rank : c->rank, to = from == rank ? c->rank : rank;
    uint64_t sent = from == rank ? sends[c->rank] : o->in_bytes[rank], expected = from == rank ? o->out_bytes[rank] : expects[c->rank];
    if (sent == expected) return 1;
    fail(c, "rank %d sends %llu bytes in an all_to_all to rank %d, which expects %llu", c->names[from],
         (unsigned long long)sent, c->names[to], (unsigned long long)expected);
    return 0;
}
static int agreed(Context *c, Op *o, uint64_t phase) {
    const uint64_t *expected = o->kind == ALL_GATHER ? o->out_bytes : NULL;
    for (int r = 0; r < c->n; r++)
        if (needs(c, o, r) && !(same_call(c, r, phase, expected) && same_size(c, o, r, phase))) return 0;
    return 1;
}
/* The phase is over on this rank; 0 if that of another was of another call. Where only the root reads, or is read, of two
 * ranks the later one compares. Who waits, waits for all or for the root: nobody else need wake a sleeper. */
static int publish(Context *c, Op *o, uint64_t phase) {
    atomic_store(&c->lines[c->rank].count, phase + 1);
    int all = 1;
    for (int r = 0; r < c->n; r++) {
        int there = atomic_load(&c->lines[r].count) > phase;
        if (there && rooted(o->kind) && r != c->rank && !same_call(c, r, phase, NULL)) return 0;
        all = all && there;
    }
    if (all || (rooted(o->kind) && is_root(c, o))) ring_others(c);
    return 1;
}

/* Go as far as the others let it; 1 once the operation has ended. */
static int advance(Context *c, Op *o) {
    for (; o->k <= o->phases; o->k++) {
        uint64_t phase = o->first + o->k;
        int last = o->k == o->phases; /* only reads */
        if (!(last ? needed_reached(c, o, phase) : all_reached(c, o->k ? phase : readers(c, o, phase)))) return 0;
        if (o->k == 1) {
            if (!agreed(c, o, phase - 1)) return 0;
            learn(c, o, phase - 1);
            last = o->k == o->phases;
        }
        if (!last) place(c, o, phase);
        if (!last || o->split) put(c, o, phase);
        if (o->k) get(c, o, o->k - 1, phase - 1);
        if (last) break;
        say(c, o, phase);
        if (!publish(c, o, phase)) return 0;
    }
    c->phase = o->first + o->phases;
    return 1;
}

/* ---- messages ---------------------------------------------------------------------------------------------------- */

static char *flow(Pipe *p) { return (char *)(p + 1); }

static void pour(Context *c, Pipe *p, uint64_t at, const char *bytes, uint64_t n) {
    uint64_t from = at % c->pipe, first = smaller(n, c->pipe - from);
    copy(flow(p) + from, bytes, first);
    copy(flow(p), bytes + first, n - first);
}
static void draw(Context *c, Pipe *p, uint64_t at, void *bytes, uint64_t n) {
    uint64_t from = at % c->pipe, first = smaller(n, c->pipe - from);
    copy(bytes, flow(p) + from, first);
    copy((char *)bytes + first, flow(p), n - first);
}

static void finish(Op *o) { atomic_store_explicit(&o->done, 1, memory_order_release); }

/* Both sides go in steps, so that one can write while the other reads. Frames and messages begin on a line. */
static int send_some(Context *c, int to) { /* how many operations ended */
    int ended = 0;
    Op *o;
    Pipe *p = pipe_of(c, c->rank, to);
    while ((o = c->sends[to])) {
        uint64_t at = atomic_load_explicit(&p->written, memory_order_relaxed), began = at;
        uint64_t room = c->pipe - (at - atomic_load_explicit(&p->read, memory_order_acquire));
        if (!o->framed && room) {
            Frame frame = {o->tag, o->bytes, {0}};
            copy(flow(p) + at % c->pipe, &frame, sizeof frame);
            at += sizeof frame; room -= sizeof frame; o->framed = 1;
        }
        if (o->framed) {
            uint64_t n = smaller(smaller(room, STEP), o->bytes - o->done_bytes);
            pour(c, p, at, o->in[0] + o->done_bytes, n);
            o->done_bytes += n; at += rounded(n);
        }
        if (at == began) return ended;
        atomic_store(&p->written, at);
        ring(c, to);
        if (o->done_bytes < o->bytes) continue;
        c->sends[to] = o->next;
        finish(o);
        ended++;
    }
    return ended;
}

static Op *take_receive(Context *c, int from, int64_t tag) {
    for (Op **at = &c->receives; *at; at = &(*at)->next)
        if (((*at)->peer == from || (*at)->peer < 0) && (*at)->tag == tag) {
            Op *o = *at;
            *at = o->next;
            return o;
        }
    return NULL;
}
static int fits(Context *c, Op *o, int from, uint64_t bytes) {
    if (o->bytes == bytes) return 1;
    fail(c, "rank %d sent %llu bytes with tag %lld where rank %d receives %llu", c->names[from], (unsigned long long)bytes,
         (long long)o->tag, c->names[c->rank], (unsigned long long)o->bytes);
    return 0;
}
static void keep(Context *c, int from, Frame frame, char *bytes) {
    Kept **at = &c->kept[from], *kept = malloc(sizeof *kept);
    *kept = (Kept){frame, bytes, NULL};
    while (*at) at = &(*at)->next;
    *at = kept;
}
static void land(Op *o, int from) { o->peer = from; finish(o); }

static int receive_some(Context *c, int from) {
    int ended = 0;
    Pipe *p = pipe_of(c, from, c->rank);
    Incoming *now = &c->incoming[from];
    for (;;) {
        uint64_t at = atomic_load_explicit(&p->read, memory_order_relaxed), began = at;
        uint64_t left = atomic_load_explicit(&p->written, memory_order_acquire) - at;
        if (!now->active) {
            if (!c->receives || !left) return ended;
            draw(c, p, at, &now->frame, sizeof(Frame));
            at += sizeof(Frame); left -= sizeof(Frame);
            now->active = 1; now->got = 0;
            now->op = take_receive(c, from, now->frame.tag);
            if (now->op && !fits(c, now->op, from, now->frame.bytes)) return ended;
            now->data = now->op ? now->op->out[0] : malloc(now->frame.bytes + 1);
        }
        uint64_t n = smaller(smaller(left, STEP), now->frame.bytes - now->got);
        draw(c, p, at, now->data + now->got, n);
        now->got += n; at += rounded(n);
        if (at != began) { atomic_store(&p->read, at); ring(c, from); }
        if (now->got < now->frame.bytes) {
            if (at == began) return ended;
            continue;
        }
        now->active = 0;
        if (!now->op) {                       /* somebody may have asked for it while it came */
            now->op = take_receive(c, from, now->frame.tag);
            if (now->op) {
                if (!fits(c, now->op, from, now->frame.bytes)) return ended;
                copy(now->op->out[0], now->data, now->frame.bytes);
                free(now->data);
            } else keep(c, from, now->frame, now->data);
        }
        if (now->op) { land(now->op, from); ended++; }
    }
}

static int receive_kept(Context *c, Op *o) { /* a message that came before it was asked for */
    for (int r = 0; r < c->n; r++) {
        if (o->peer >= 0 && o->peer != r) continue;
        for (Kept **at = &c->kept[r]; *at; at = &(*at)->next) {
            Kept *kept = *at;
            if (kept->frame.tag != o->tag) continue;
            if (!fits(c, o, r, kept->frame.bytes)) return 1;
            copy(o->out[0], kept->data, o->bytes);
            *at = kept->next;
            free(kept->data);
            free(kept);
            land(o, r);
            return 1;
        }
    }
    return 0;
}

/* ---- who does the work ------------------------------------------------------------------------------------------- */

/* Operations are posted at the door, where nobody stays long: whoever starts one does not wait for those under way. */
static void post(Context *c, Op *o) {
    pthread_mutex_lock(&c->door);
    if (o->kind < SEND) o->serial = ++c->serial;
    *c->end = o;
    c->end = &o->next;
    atomic_fetch_add(&c->open, 1);
    atomic_store(&c->news, 1);
    pthread_mutex_unlock(&c->door);
}
static int take_in(Context *c) { /* how many ended at once */
    int ended = 0;
    if (!atomic_load(&c->news)) return 0;
    pthread_mutex_lock(&c->door);
    Op *o = c->posted, *next, **last;
    c->posted = NULL;
    c->end = &c->posted;
    atomic_store(&c->news, 0);
    pthread_mutex_unlock(&c->door);
    for (; o; o = next) {
        next = o->next;
        o->next = NULL;
        if (o->kind < SEND) {
            if (c->tail) c->tail->next = o; else { c->queue = o; begin(c, o); }
            c->tail = o;
            continue;
        }
        c->messages = 1;
        if (o->kind == RECV && receive_kept(c, o)) { ended++; continue; }
        last = o->kind == SEND ? &c->sends[o->peer] : &c->receives;
        while (*last) last = &(*last)->next;
        *last = o;
    }
    return ended;
}

static void go_on(Context *c, int (*lock)(pthread_mutex_t *)) {
    if (lock(&c->lock)) return;
    int ended = broken(c) ? 0 : take_in(c);
    while (c->queue && !broken(c) && advance(c, c->queue)) {
        Op *o = c->queue;
        c->queue = o->next;
        if (c->queue) begin(c, c->queue); else c->tail = NULL;
        finish(o);
        ended++;
    }
    for (int r = 0; r < c->n && c->messages && !broken(c); r++) {
        ended += send_some(c, r);
        ended += receive_some(c, r);
    }
    pthread_mutex_unlock(&c->lock);
    if (ended) { atomic_fetch_sub(&c->open, ended); ring(c, c->rank); }
}

static int is_done(Op *o) { return atomic_load_explicit(&o->done, memory_order_acquire); }

static void progress(Context *c) { go_on(c, pthread_mutex_trylock); } /* unless another thread is at it */
/* A rank that died or left may have sent before all that is waited for: look once more before it is blamed. */
static void look_again(Context *c) { go_on(c, pthread_mutex_lock); }

/* Sleep until a peer rings, at most for NAP_NS; the flag goes up before the last look, so that no ring is missed. */
static void doze(Context *c, Op *o) {
    Line *me = &c->lines[c->rank];
    uint32_t seen = atomic_load(&me->bell);
    atomic_fetch_add(&me->sleepers, 1);
    progress(c);
    if (!(o && is_done(o)) && !broken(c) && !(!o && !atomic_load(&c->open))) nap(&me->bell, seen, NAP_NS);
    atomic_fetch_sub(&me->sleepers, 1);
}

static int state(Context *c, Op *o) { return is_done(o) ? OK : broken(c) ? FAILED : AGAIN; }

/* Whether to go on waiting awake: spinning, or where others need the core, by giving it away. */
static int patient(Context *c, int64_t waited) {
    if (waited >= (c->crowded ? YIELD_NS : SPIN_NS)) return 0;
    if (c->crowded) sched_yield(); else RELAX();
    return 1;
}

/* OK when `o` has ended, FAILED when the group has, AGAIN after `slice_s` seconds. */
int shm_wait(Context *c, Op *o, double slice_s) {
    progress(c);
    if (state(c, o) != AGAIN) return state(c, o);
    int64_t began = now_ns(), limit = began + (int64_t)(slice_s * 1e9), looked = began, now = began;
    atomic_fetch_add(&c->waiting, 1);
    for (int turn = 1; state(c, o) == AGAIN && now < limit; turn++) {
        if (patient(c, now - began)) {
            progress(c);
            if (c->crowded || turn % TURNS == 0) now = now_ns();
            continue;
        }
        doze(c, o);
        now = now_ns();
        if (state(c, o) == AGAIN && now - looked >= NAP_NS) {
            looked = now;
            int lost = first_dead(c), left = gone(c, o);
            if (lost < 0 && left < 0) continue;
            look_again(c);
            if (state(c, o) != AGAIN) break;
            if (lost >= 0) fail(c, "rank %d died", c->names[lost]);
            else fail(c, "rank %d left the group before it took part", c->names[left]);
        }
    }
    atomic_fetch_sub(&c->waiting, 1);
    return state(c, o);
}

int shm_test(Context *c, Op *o) {
    if (!is_done(o)) progress(c);
    return state(c, o);
}

/* The helper goes on with what nobody waits for. It leaves what is waited for at once to the waiting thread. */
static void *help(void *given) {
    Context *c = given;
    int idle = 0;
    int64_t looked = 0;
    struct timespec pause = {0, HELP_AFTER_NS};
    while (!atomic_load(&c->closing)) {
        if (!atomic_load(&c->open)) {
            if (++idle < LINGER) { nanosleep(&pause, NULL); continue; }
            for (;;) { /* the word is set before each look: whoever starts an operation clears it and wakes us */
                atomic_store(&c->asleep, 1);
                if (atomic_load(&c->open) || atomic_load(&c->closing)) break;
                syscall(SYS_futex, &c->asleep, FUTEX_WAIT, 1, NULL, NULL, 0);
            }
            atomic_store(&c->asleep, 0);
        }
        idle = 0;
        nanosleep(&pause, NULL);
        if (broken(c)) { atomic_store(&c->open, 0); continue; } /* nothing will go on: sleep until the end */
        if (atomic_load(&c->waiting)) continue;
        doze(c, NULL);
        if (now_ns() - looked >= NAP_NS) {
            looked = now_ns();
            int lost = first_dead(c);
            if (lost >= 0) look_again(c);
            if (lost >= 0 && atomic_load(&c->open)) fail(c, "rank %d died", c->names[lost]);
        }
    }
    return NULL;
}
static void wake_helper(Context *c) {
    if (atomic_load(&c->closing)) return;
    if (!c->helped) {
        pthread_mutex_lock(&c->door); /* two threads must not both create it */
        if (!c->helped) c->helped = pthread_create(&c->helper, NULL, help, c) == 0;
        pthread_mutex_unlock(&c->door);
    }
    int yes = 1;
    if (atomic_compare_exchange_strong(&c->asleep, &yes, 0)) syscall(SYS_futex, &c->asleep, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* ---- calls from outside ------------------------------------------------------------------------------------------ */

/* `base` is the mapped segment, zeroed when it was made; names[r] is what errors call rank r, watched[r] an open
 * /proc/PID/stat of it, or -1. `crowded` when there are more ranks than cores: then waiting gives the core away. */
Context *shm_open_group(char *base, int rank, int n, uint64_t chunk, uint64_t pipe, uint64_t heap, int crowded,
                        const int *names, const int *watched) {
    Context *c = calloc(1, sizeof *c);
    c->base = base; c->rank = rank; c->n = n; c->chunk = chunk; c->pipe = pipe; c->heap = heap; c->crowded = crowded;
    c->heaps = base + shm_fixed(n, chunk, pipe);
    c->head = (Head *)base;
    c->lines = (Line *)(base + sizeof(Head));
    c->names = calloc(n, sizeof *c->names);
    c->watched = calloc(n, sizeof *c->watched);
    memcpy(c->names, names, n * sizeof *names);
    memcpy(c->watched, watched, n * sizeof *watched);
    c->sends = calloc(n, sizeof *c->sends);
    c->incoming = calloc(n, sizeof *c->incoming);
    c->kept = calloc(n, sizeof *c->kept);
    c->end = &c->posted;
    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->door, NULL);
    return c;
}

static Op *make(uint32_t kind, int n) {
    Op *o = calloc(1, sizeof *o + 2 * n * (sizeof *o->in + sizeof *o->in_bytes));
    o->kind = kind;
    o->in = (char **)(o + 1);
    o->out = o->in + n;
    o->in_bytes = (uint64_t *)(o->out + n);
    o->out_bytes = o->in_bytes + n;
    return o;
}
static void measure(Context *c, Op *o) { /* the largest piece */
    for (int r = 0; r < c->n; r++) {
        if (o->kind == ALL_GATHER && o->out_bytes[r] > o->most) o->most = o->out_bytes[r];
        if (o->kind == ALL_TO_ALL && r != c->rank && o->in_bytes[r] > o->most) o->most = o->in_bytes[r];
    }
}

/* Start a collective. in, out: pointers, one or one for each rank as the operation has it; sizes in bytes. NULL when
 * the group has failed. The tensors must live until the operation has ended, and the handle must be released. */
Op *shm_start(Context *c, int kind, int dtype, int reduction, int root, uint64_t bytes, int ins, char **in,
              uint64_t *in_bytes, int outs, char **out, uint64_t *out_bytes) {
    if (broken(c)) return NULL;
    Op *o = make(kind, c->n);
    o->dtype = dtype; o->reduction = reduction; o->root = root; o->bytes = bytes;
    for (int i = 0; i < ins; i++) { o->in[i] = in[i]; o->in_bytes[i] = in_bytes[i]; }
    for (int i = 0; i < outs; i++) { o->out[i] = out[i]; o->out_bytes[i] = out_bytes[i]; }
    if (kind == ALL_GATHER) o->in_bytes[c->rank] = bytes;
    measure(c, o);
    post(c, o);
    wake_helper(c);
    return o;
}

/* The same for contiguous tensors whose pieces (`bytes` each) lie one after the other. `what` is
 * kind | dtype << 8 | reduction << 16 | root << 32. */
static Op *flat(Context *c, uint64_t what, char *in, char *out, uint64_t bytes) {
    uint32_t kind = what & 255;
    int spread = kind == REDUCE_SCATTER || kind == SCATTER || kind == ALL_TO_ALL;
    int gathers = kind == ALL_GATHER || kind == GATHER || kind == ALL_TO_ALL;
    Op *o = make(kind, c->n);
    o->dtype = what >> 8 & 255; o->reduction = what >> 16 & 255; o->root = what >> 32;
    o->bytes = kind == ALL_TO_ALL ? 0 : bytes;
    for (int r = 0; r < c->n; r++) {
        o->in[r] = in + (spread ? r * bytes : 0);
        o->out[r] = out + (gathers ? r * bytes : 0);
        o->in_bytes[r] = o->out_bytes[r] = bytes;
    }
    measure(c, o);
    post(c, o);
    return o;
}
Op *shm_begin(Context *c, uint64_t what, char *in, char *out, uint64_t bytes) {
    if (broken(c)) return NULL;
    Op *o = flat(c, what, in, out, bytes);
    wake_helper(c);
    return o;
}

/* The same without a helper, for whoever calls `shm_end` at once. */
Op *shm_post(Context *c, uint64_t what, char *in, char *out, uint64_t bytes) { return flat(c, what, in, out, bytes); }

/* Wait for what was posted. OK: it has ended, and the handle is gone. Else it is to be waited for and released: FAILED
 * when the group has, AGAIN after `slice_s` seconds. */
int shm_end(Context *c, Op *o, double slice_s) {
    int outcome = shm_wait(c, o, slice_s);
    if (outcome == OK) free(o);
    else wake_helper(c); /* whoever called may do something else before it waits again */
    return outcome;
}

/* Start a message of `bytes` to or from `peer` (-1: from anybody). */
Op *shm_message(Context *c, int kind, int peer, int64_t tag, char *at, uint64_t bytes) {
    if (broken(c)) return NULL;
    Op *o = make(kind, 1);
    o->peer = peer; o->tag = tag; o->bytes = bytes;
    o->in[0] = o->out[0] = at;
    post(c, o);
    progress(c);
    if (!is_done(o)) wake_helper(c);
    return o;
}

/* The rank that a message came from. */
int shm_peer(Op *o) { return (int)o->peer; }

static void unlink_op(Op **at, Op *o) {
    while (*at && *at != o) at = &(*at)->next;
    if (*at) *at = o->next;
}
/* Forget an operation that has ended, or one of a group that has failed: its tensors are not touched any more. */
void shm_release(Context *c, Op *o) {
    if (!is_done(o)) {
        pthread_mutex_lock(&c->lock);
        pthread_mutex_lock(&c->door);
        unlink_op(&c->posted, o);
        for (c->end = &c->posted; *c->end;) c->end = &(*c->end)->next;
        pthread_mutex_unlock(&c->door);
        unlink_op(&c->queue, o);
        c->tail = c->queue;
        while (c->tail && c->tail->next) c->tail = c->tail->next;
        unlink_op(&c->receives, o);
        for (int r = 0; r < c->n; r++) {
            unlink_op(&c->sends[r], o);
            if (c->incoming[r].op == o) c->incoming[r] = (Incoming){0};
        }
        pthread_mutex_unlock(&c->lock);
    }
    free(o);
}

/* Returns once no thread of this process is inside an operation of a group that has failed. */
void shm_settle(Context *c) {
    pthread_mutex_lock(&c->lock);
    pthread_mutex_unlock(&c->lock);
}

/* This rank starts nothing any more, and no thread of the group runs afterwards. */
void shm_leave(Context *c) {
    atomic_store(&c->lines[c->rank].left, 1);
    ring_others(c);
    atomic_store(&c->closing, 1);
    if (!c->helped) return;
    atomic_store(&c->asleep, 0);
    syscall(SYS_futex, &c->asleep, FUTEX_WAKE, 1, NULL, NULL, 0);
    pthread_join(c->helper, NULL);
    c->helped = 0;
}
void shm_free(Context *c) {
    for (int r = 0; r < c->n; r++)
        for (Kept *next, *k = c->kept[r]; k; k = next) { next = k->next; free(k->data); free(k); }
    free(c->names); free(c->watched); free(c->sends); free(c->incoming); free(c->kept);
    pthread_mutex_destroy(&c->lock);
    pthread_mutex_destroy(&c->door);
    free(c);
}
