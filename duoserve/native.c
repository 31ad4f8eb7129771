/* y = x @ W.T for int4 matrices in tile64 order (int4.py), in bfloat16, on CPUs with AVX-512 BF16 and VBMI.
 *
 *     y[m, n] = sum over groups g of  scale[g, n] * sum over k in g of (q[n, k] - 8) * x[m, k]  +  zero[g, n] * sum of x[m, g]
 *
 * Sums are float32, in the order of k, each by one accumulator: a row of y is the same however many rows there are and
 * however many threads. Knows pointers and shapes only; memory, checks and the choice to come here are native.py's.
 */
#include <math.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && (__GNUC__ >= 10 || defined(__clang__))
#include <immintrin.h>
#define UNROLLED _Pragma("GCC unroll 8") /* what is indexed by these loops lives in registers */
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")))

enum { TILE = 64, ROWS = 6, MAX_PAIRS = 32 }; /* rows of W, rows of x at a time, pairs of k in a group */
enum { AHEAD = 4096 };                         /* bytes: the processor's own prefetching ends at a page; 29 GB/s, not 25 */

typedef struct {
    const uint16_t *x, *scale_zero;
    const uint8_t *packed;
    const float *sums; /* (M, K / group) */
    uint16_t *y;
    float *partial; /* (threads, M, TILE) where M > 1 */
    int64_t m, n, k, group;
    int64_t next, threads; /* taken by whoever is free */
} Job;

typedef struct {
    __m512i first, second, nibbles;
} Tables;

WIDE static inline Tables tables(void) {
    static const uint16_t values[16] = {/* -8 .. 7 as bfloat16 */
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    uint8_t first[64] = {0}, second[64] = {0};
    for (int row = 0; row < 16; row++)
        for (int pair = 0; pair < 2; pair++) {
            first[4 * row + 2 * pair] = (uint8_t)(32 * pair + row);
            second[4 * row + 2 * pair] = (uint8_t)(32 * pair + 16 + row);
        }
    Tables t;
    t.first = _mm512_loadu_si512(first);
    t.second = _mm512_loadu_si512(second);
    t.nibbles = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values));
    return t;
}

/* Two columns of a tile, 64 bytes, as four vectors of 16 rows, each lane (w[k], w[k + 1]). vpermw looks at five bits of each
 * word and its table repeats after sixteen entries: the other nibble need not be masked away. */
WIDE static inline void unpack(const uint8_t *bytes, const Tables *t, __m512bh *w) {
    __m512i both = _mm512_loadu_si512(bytes);
    __m512i a = _mm512_permutexvar_epi8(t->first, both), b = _mm512_permutexvar_epi8(t->second, both);
    w[0] = (__m512bh)_mm512_permutexvar_epi16(a, t->nibbles);
    w[1] = (__m512bh)_mm512_permutexvar_epi16(b, t->nibbles);
    w[2] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(a, 4), t->nibbles);
    w[3] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(b, 4), t->nibbles);
}

WIDE static inline __m512bh two(const uint16_t *x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* total + scale * acc + zero * sum, for sixteen rows of W */
WIDE static inline __m512 closed(__m512 total, __m512 acc, const uint16_t *scale_zero, float sum) {
    __m512i both = _mm512_loadu_si512(scale_zero);
    __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
    return _mm512_fmadd_ps(zero, _mm512_set1_ps(sum), _mm512_fmadd_ps(scale, acc, total));
}

WIDE static inline void store(uint16_t *y, __m512 value) {
    _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(value));
}

/* One row of x: the matrix streams through registers once. */
WIDE static void one_row(const Job *job, int64_t tile, const Tables *t) {
    const uint8_t *bytes = job->packed + tile * TILE / 2 * job->k;
    __m512 total[4];
    UNROLLED for (int v = 0; v < 4; v++) total[v] = _mm512_setzero_ps();
    for (int64_t g = 0; g * job->group < job->k; g++) {
        const uint16_t *x = job->x + g * job->group, *sz = job->scale_zero + 2 * (g * job->n + tile * TILE);
        __m512 acc[4];
        UNROLLED for (int v = 0; v < 4; v++) acc[v] = _mm512_setzero_ps();
        for (int64_t k = 0; k < job->group; k += 2, bytes += TILE) {
            _mm_prefetch((const char *)bytes + AHEAD, _MM_HINT_T0);
            __m512bh w[4], pair = two(x + k);
            unpack(bytes, t, w);
            UNROLLED for (int v = 0; v < 4; v++) acc[v] = _mm512_dpbf16_ps(acc[v], w[v], pair);
        }
        UNROLLED for (int v = 0; v < 4; v++) total[v] = closed(total[v], acc[v], sz + 32 * v, job->sums[g]);
    }
    UNROLLED for (int v = 0; v < 4; v++) store(job->y + tile * TILE + 16 * v, total[v]);
}

/* `rows` rows of x times one unpacked group of a tile, added to their totals. */
WIDE static inline __attribute__((always_inline)) void some_rows(
    const Job *job, int64_t first, const int rows, int64_t g, const __m512bh *w, const uint16_t *sz, float *totals) {
    __m512 acc[ROWS][4];
    const uint16_t *x = job->x + first * job->k + g * job->group;
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int v = 0; v < 4; v++) acc[r][v] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < job->group / 2; pair++)
        UNROLLED for (int r = 0; r < rows; r++) {
            __m512bh both = two(x + r * job->k + 2 * pair);
            UNROLLED for (int v = 0; v < 4; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], w[4 * pair + v], both);
        }
    int64_t groups = job->k / job->group;
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int v = 0; v < 4; v++) {
            float *total = totals + (first + r) * TILE + 16 * v;
            __m512 so_far = g ? _mm512_loadu_ps(total) : _mm512_setzero_ps();
            _mm512_storeu_ps(total, closed(so_far, acc[r][v], sz + 32 * v, job->sums[(first + r) * groups + g]));
        }
}

/* Several rows of x: each group of the tile is unpacked once, into the first cache level. */
WIDE static void many_rows(const Job *job, int64_t tile, const Tables *t, float *totals) {
    const uint8_t *bytes = job->packed + tile * TILE / 2 * job->k;
    __m512bh w[4 * MAX_PAIRS];
    for (int64_t g = 0; g * job->group < job->k; g++) {
        const uint16_t *sz = job->scale_zero + 2 * (g * job->n + tile * TILE);
        for (int64_t pair = 0; pair < job->group / 2; pair++, bytes += TILE) unpack(bytes, t, w + 4 * pair);
        int64_t m = 0;
        for (; m + ROWS <= job->m; m += ROWS) some_rows(job, m, ROWS, g, w, sz, totals);
        switch (job->m - m) {
            case 5: some_rows(job, m, 5, g, w, sz, totals); break;
            case 4: some_rows(job, m, 4, g, w, sz, totals); break;
            case 3: some_rows(job, m, 3, g, w, sz, totals); break;
            case 2: some_rows(job, m, 2, g, w, sz, totals); break;
            case 1: some_rows(job, m, 1, g, w, sz, totals); break;
        }
    }
    for (int64_t m = 0; m < job->m; m++)
        UNROLLED for (int v = 0; v < 4; v++)
            store(job->y + m * job->n + tile * TILE + 16 * v, _mm512_loadu_ps(totals + m * TILE + 16 * v));
}

WIDE static void work(void *data) {
    Job *job = data;
    Tables t = tables();
    int64_t me = __atomic_fetch_add(&job->threads, 1, __ATOMIC_RELAXED), tile;
    while ((tile = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) * TILE < job->n) {
        if (job->m == 1)
            one_row(job, tile, &t);
        else
            many_rows(job, tile, &t, job->partial + me * job->m * TILE);
    }
}

/* What each group of each row of x sums to, in the order of k. */
static void sum_groups(const uint16_t *x, int64_t n, int64_t group, float *sums) {
    for (int64_t g = 0; g < n / group; g++) {
        float sum = 0;
        for (int64_t k = 0; k < group; k++) {
            uint32_t bits = (uint32_t)x[g * group + k] << 16;
            float value;
            __builtin_memcpy(&value, &bits, 4);
            sum += value;
        }
        sums[g] = sum;
    }
}

WIDE static float dot(const float *a, const float *b, int64_t n) {
    __m512 sum = _mm512_setzero_ps(), other = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
        other = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), other);
    }
    float rest = 0;
    for (; i < n; i++) rest += a[i] * b[i];
    return _mm512_reduce_add_ps(_mm512_add_ps(sum, other)) + rest;
}

static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

/* One row of a predictor's head (predictor/model.py): scores = sigmoid(z[:e] + v silu(z[e:])), z = w f + b; w is (e + units, n),
 * v (e, units), all float32. Called with the interpreter's lock held: it takes less time than handing that over. */
WIDE void duoserve_head(const float *w, const float *b, const float *v, const float *f, float *z, float *scores, int64_t n,
                        int64_t e, int64_t units) {
    for (int64_t i = 0; i < e + units; i++) z[i] = b[i] + dot(w + i * n, f, n);
    for (int64_t i = e; i < e + units; i++) z[i] *= sigmoid(z[i]);
    for (int64_t i = 0; i < e; i++) scores[i] = sigmoid(z[i] + dot(v + i * units, z + e, units));
}

int duoserve_supported(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

/* Shapes in elements: n a multiple of 64, k of `group`, group 32 or 64. `room` holds m * k / group + threads * m * 64 floats.
 * `parallel` is GOMP_parallel of the OpenMP runtime that torch uses, so that both share one pool of threads, or null. */
void duoserve_int4_linear(const uint16_t *x, const uint8_t *packed, const uint16_t *scale_zero, uint16_t *y, float *room,
                          int64_t m, int64_t n, int64_t k, int64_t group, unsigned threads,
                          void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    Job job = {x, scale_zero, packed, room, y, room + m * k / group, m, n, k, group, 0, 0};
    sum_groups(x, m * k, group, room);
    if (parallel && threads > 1)
        parallel(work, &job, threads, 0);
    else
        work(&job);
}

#else

int duoserve_supported(void) { return 0; }

void duoserve_int4_linear(const uint16_t *x, const uint8_t *packed, const uint16_t *scale_zero, uint16_t *y, float *room,
                          int64_t m, int64_t n, int64_t k, int64_t group, unsigned threads,
                          void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {}

void duoserve_head(const float *w, const float *b, const float *v, const float *f, float *z, float *scores, int64_t n,
                   int64_t e, int64_t units) {}

#endif
