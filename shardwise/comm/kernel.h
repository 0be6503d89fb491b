/* What the package's C files share: how they are compiled for wide registers, bfloat16, and the kernel's calls. */

#ifndef SHARDWISE_KERNEL_H
#define SHARDWISE_KERNEL_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

static inline float from_bf16(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
static inline uint16_t to_bf16(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    uint16_t rounded = (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    return (u & 0x7fffffffu) > 0x7f800000u ? (uint16_t)((u >> 16) | 0x40u) : rounded;
}

typedef struct Context Context;
typedef struct Op Op;
Op *shm_begin(Context *c, uint64_t what, char *in, char *out, uint64_t bytes);
Op *shm_post(Context *c, uint64_t what, char *in, char *out, uint64_t bytes);
int shm_end(Context *c, Op *o, double slice_s);
int shm_wait(Context *c, Op *o, double slice_s);
void shm_release(Context *c, Op *o);

#endif
