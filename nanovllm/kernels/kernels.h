/* What the kernels are given, and their names. The same structures stand in c_library.py, field by field. */
#pragma once
#include "vectors.h"

/* A step's attention (kernels.c). Shapes as in interface.py: N tokens, S sequences, H, G heads, D head size. */
typedef struct {
    /* of the step; set once by the plan */
    int64_t num_tokens, num_decodes, num_units, heads, kv_heads, dim, block_size, block_stride, max_blocks, window;
    const int64_t *slot_blocks, *slot_offsets;      /* [N] where each token's KV goes */
    const int64_t *tables;                          /* [S, max_blocks] */
    const int64_t *decodes, *decode_rows, *contexts; /* [U] sequences of one query: which, their row, their keys */
    const int64_t *unit_seqs, *first_units;         /* [U] sequence of a unit; [S + 1] first unit of a sequence */
    float *partial;                                 /* [U, G, R, D + 2]: weighted values, their weight, largest score */
    int64_t num_tiles;                              /* T tiles: tokens of one sequence that attend together */
    const int64_t *tile_seqs, *tile_rows, *tile_counts, *tile_positions; /* [T]; first row of the step, first position */
    parallel_fn parallel;
    int64_t threads;
    float scale;
    /* of the layer */
    elem *qkv;              /* [N, H + 2 G, D]; q is rotated in place */
    elem *kv;               /* keys of this layer in block 0; values lie G * block_size * D behind */
    const elem *cos, *sin;  /* [N, D / 2], or NULL: nothing is rotated */
    elem *out;              /* [N, H, D] */
} step_args;

/* A linear over a grouped weight (grouped.c), for at most FEW rows. */
#define FEW 2
typedef struct {
    const uint8_t *codes;          /* [out, in * bits / 8], in runs: see there */
    const float *scales, *offsets; /* [out, in / GROUP] */
    const elem *bias;              /* [out], or NULL */
    const elem *x;                 /* [rows, in] */
    void *y;                       /* [rows, out] elem, or float */
    int64_t rows, in, out, bits;
    int64_t is_float;              /* y is: nothing is rounded */
} grouped_args;

/* A linear over a weight in panels (panels.c). */
typedef struct {
    const void *panels; /* [out / WIDE, in / PER_WORD, WIDE] words; zeros behind the last output */
    const elem *bias;   /* [out], or NULL */
    const elem *x;      /* [rows, in] */
    void *y;            /* [rows, out] elem, or float */
    int64_t rows, in, out;
    int64_t is_float;   /* y is: nothing is rounded */
} panel_args;

void add_norm(elem *x, const elem *delta, const elem *weight, elem *out, int64_t rows, int64_t width, float eps,
              parallel_fn parallel, int threads);
void silu_mul(const elem *gate_up, elem *out, int64_t rows, int64_t width, parallel_fn parallel, int threads);
void attend_layer(const step_args *a);
void grouped_linear(const grouped_args *a, parallel_fn parallel, int threads);
void panel_linear(const panel_args *a, parallel_fn parallel, int threads);

typedef struct team team; /* team.c */
team *team_open(int size);
void team_close(team *t);
void team_call(team *t);
void team_dismiss(team *t);
void team_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
