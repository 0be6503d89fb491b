/* Blocks of float32 as integers of 8, 4 or 2 bits with a bfloat16 scale each, laid out as codec.py says, and what replicas
 * do with them (one_pass.py): one pass over what a training step has long driven out of the caches, where torch needs ten.
 * No torch and no Python in it. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernel.h"

enum { LANES = 16, LONGEST = 1024 };          /* partial sums of a block; the longest block */
static const float TINY = 0x1p-126f;          /* the smallest scale whose inverse is finite */
static const float WHOLE = 0x1.8p23f;         /* adding it rounds to the nearest integer, halves to even */

/* The larger of `weight` times the sum of the magnitudes and the largest of them / `divisor`; NaN where there is one. */
static inline float scale_of(const float *x, uint64_t block, float weight, float divisor) {
    uint32_t largest[LANES] = {0}, most = 0;
    float sums[LANES] = {0}, sum = 0, found;
    for (uint64_t at = 0; at < block; at += LANES)
        for (int i = 0; i < LANES; i++) {
            uint32_t u;
            memcpy(&u, x + at + i, 4);
            u &= 0x7fffffffu;                 /* as integers magnitudes are in order, with NaN above all */
            largest[i] = u > largest[i] ? u : largest[i];
        }
    for (uint64_t at = 0; at < block; at += LANES)
        for (int i = 0; i < LANES; i++) sums[i] += fabsf(x[at + i]) * weight;
    for (int i = 0; i < LANES; i++) { most = largest[i] > most ? largest[i] : most; sum += sums[i]; }
    memcpy(&found, &most, 4);
    found /= divisor;
    if (found < sum) found = sum;
    return found < TINY ? TINY : found;
}

static inline void encode_block(const float *x, int8_t *codes, uint16_t *scale, uint64_t block, int bits, float weight,
                                float divisor) {
    int8_t whole[LONGEST];
    *scale = to_bf16(scale_of(x, block, weight, divisor));
    float inverse = 1.0f / from_bf16(*scale);
    for (uint64_t i = 0; i < block; i++) {
        float step = x[i] * inverse;
        if (bits == 2) { step = step > 1.0f ? 1.0f : step; step = step < -1.0f ? -1.0f : step; }
        whole[i] = (int8_t)(int32_t)((step + WHOLE) - WHOLE);
    }
    if (bits == 8) { memcpy(codes, whole, block); return; }
    uint64_t part = block * bits / 8;         /* the halves or quarters of a block share its bytes */
    uint8_t mask = (uint8_t)((1 << bits) - 1);
    for (uint64_t i = 0; i < part; i++) codes[i] = (int8_t)(whole[i] & mask);
    for (int place = 1; place < 8 / bits; place++)
        for (uint64_t i = 0; i < part; i++)
            codes[i] = (int8_t)((uint8_t)codes[i] | (uint8_t)((whole[place * part + i] & mask) << (place * bits)));
}
static inline void decode_block(const int8_t *codes, float scale, float *out, uint64_t block, int bits) {
    uint64_t part = block * bits / 8;
    for (int place = 0; place < 8 / bits; place++) {
        int up = 8 - (place + 1) * bits, down = 8 - bits;
        for (uint64_t i = 0; i < part; i++)
            out[place * part + i] = (float)((int8_t)((uint8_t)codes[i] << up) >> down) * scale;
    }
}

/* `block` is a multiple of 64, at most LONGEST; the last one may lack values, which count as zeros. */
WIDE void codec_encode(const float *values, int8_t *codes, uint16_t *scales, uint64_t numel, uint64_t block, int bits,
                       float weight, float divisor) {
    uint64_t whole = numel / block, rest = numel % block, bytes = block * bits / 8;
    for (uint64_t b = 0; b < whole; b++)
        encode_block(values + b * block, codes + b * bytes, scales + b, block, bits, weight, divisor);
    if (!rest) return;
    float padded[LONGEST] = {0};
    memcpy(padded, values + whole * block, rest * sizeof *values);
    encode_block(padded, codes + whole * bytes, scales + whole, block, bits, weight, divisor);
}
WIDE void codec_decode(const int8_t *codes, const uint16_t *scales, float *out, uint64_t numel, uint64_t block, int bits) {
    uint64_t whole = numel / block, rest = numel % block, bytes = block * bits / 8;
    for (uint64_t b = 0; b < whole; b++)
        decode_block(codes + b * bytes, from_bf16(scales[b]), out + b * block, block, bits);
    if (!rest) return;
    float padded[LONGEST];
    decode_block(codes + whole * bytes, from_bf16(scales[whole]), padded, block, bits);
    memcpy(out + whole * block, padded, rest * sizeof *out);
}

/* ---- replicas that meet ------------------------------------------------------------------------------------------ */

/* Tensors that lie apart, read and written as if they followed each other. */
typedef struct { float *const *parts; const uint64_t *sizes; uint64_t part, at; } Walk;
static inline uint64_t stretch(Walk *w, uint64_t most) { /* how many of the next values lie together */
    while (w->at == w->sizes[w->part]) { w->part++; w->at = 0; }
    uint64_t left = w->sizes[w->part] - w->at;
    return left < most ? left : most;
}

/* Code how far `parts` (`numel` values together) are from `meeting`. */
WIDE void replica_tell(float *const *parts, const uint64_t *sizes, const float *meeting, int8_t *codes, uint16_t *scales,
                       uint64_t numel, uint64_t block, int bits, float weight, float divisor) {
    uint64_t bytes = block * bits / 8;
    Walk w = {parts, sizes, 0, 0};
    for (uint64_t from = 0; from < numel; from += block, codes += bytes, scales++) {
        uint64_t n = numel - from < block ? numel - from : block, m;
        float away[LONGEST];
        for (uint64_t i = n; i < block; i++) away[i] = 0;
        for (uint64_t at = 0; at < n; at += m, w.at += m) {
            m = stretch(&w, n - at);
            const float *here = parts[w.part] + w.at, *there = meeting + from + at;
            for (uint64_t i = 0; i < m; i++) away[at + i] = there[i] - here[i];
        }
        encode_block(away, codes, scales, block, bits, weight, divisor);
    }
}

/* What `ranks` replicas told, `payload` bytes each with the scales from `scales_at` on: `meeting` moves by their mean (an
 * outer step of `rate` and Nesterov `momentum`, if there is `velocity`), and the mean takes the place in `parts` of what
 * this replica told. */
WIDE void replica_follow(float *const *parts, const uint64_t *sizes, float *meeting, float *velocity, const char *received,
                         uint64_t payload, uint64_t scales_at, int rank, int ranks, uint64_t numel, uint64_t block,
                         int bits, float rate, float momentum) {
    uint64_t bytes = block * bits / 8;
    Walk w = {parts, sizes, 0, 0};
    for (uint64_t from = 0, b = 0; from < numel; from += block, b++) {
        uint64_t n = numel - from < block ? numel - from : block, m;
        float told[LONGEST], one[LONGEST], moved[LONGEST];
        for (int r = 0; r < ranks; r++) {
            const char *said = received + r * payload;
            float *to = r == rank ? told : one;
            decode_block((const int8_t *)said + b * bytes, from_bf16(((const uint16_t *)(said + scales_at))[b]), to, block, bits);
            if (r) for (uint64_t i = 0; i < block; i++) moved[i] += to[i];
            else memcpy(moved, to, sizeof *to * block);
        }
        for (uint64_t i = 0; i < block; i++) moved[i] /= (float)ranks;
        if (velocity)
            for (uint64_t i = 0; i < n; i++) {
                float v = velocity[from + i] = velocity[from + i] * momentum + moved[i];
                moved[i] += momentum * v;
            }
        if (rate != 1.0f) for (uint64_t i = 0; i < block; i++) moved[i] *= rate;
        for (uint64_t i = 0; i < n; i++) meeting[from + i] -= moved[i];
        for (uint64_t at = 0; at < n; at += m, w.at += m) {
            m = stretch(&w, n - at);
            float *here = parts[w.part] + w.at;
            for (uint64_t i = 0; i < m; i++) here[i] += told[at + i] - moved[at + i];
        }
    }
}
