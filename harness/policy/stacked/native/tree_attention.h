/* Attention along trees: every token attends to its ancestors and itself. See `transformer.c`. */

#pragma once

#include "row_operations.h"

#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define MAX_HEAD_DIM 256

typedef struct {
    int32_t layers, hidden, heads, kv_heads, head_dim, intermediate, context;
    float eps;
    const float *cosines, *sines; /* [positions, head_dim]; sines are negated in the first half */
} model_t;

/* One layer's parameters, or their gradients, in the order of `LAYER_WEIGHTS` in `engine.py`; biases may be NULL. */
typedef struct {
    float *input_norm, *qkv, *qkv_bias, *out, *out_bias, *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
} layer_t;

/* One cell's: `embedding` [vocabulary, hidden], the final norm's scale, and the layers. */
typedef struct {
    float *embedding, *norm;
    layer_t layer[];
} weights_t;

/* The tokens of a pass: `count` of them, the first at row `start` among all tokens so far. `parents` are rows, -1 where
   a sequence begins; `outputs` are the rows, relative to `start`, whose final states are wanted. */
typedef struct {
    int64_t count, start, num_outputs;
    const int64_t *tokens, *outputs;
    const int32_t *parents, *positions;
} tokens_t;

/* Where a pass puts what it computes. `qkv` [layers, capacity, width] has queries, keys and values of all tokens so far,
   `qkv_stride` numbers from layer to layer (0: one layer's memory for all, where nobody reads it later).

   With `keep`, all that the backward pass needs stays: `saved` has `layer_numbers` for each layer, and `last_x`,
   `last_inverse` and `hidden` have a row per output. Earlier passes have filled the first `start` rows, `outputs` rows of
   outputs, and weights of attention to `attended` tokens, of outputs to `attended_outputs`. Without, `saved` has room for
   one layer of `capacity` new tokens and the weights of one of them; nothing counts. */
typedef struct {
    float *qkv, *saved, *last_x, *last_inverse, *hidden;
    int64_t qkv_stride, saved_stride, capacity, outputs, attended, attended_outputs, keep;
} memory_t;

/* A layer's part of `memory_t.saved`, a row per token (per output in the last layer, from `attn` on). */
typedef struct {
    float *x1, *inverse1, *h1, *probs, *attn, *x2, *inverse2, *h2, *gate_up, *act;
} saved_t;

/* In which order the attention of a pass's tokens is computed, and where the weights of each begin. */
typedef struct {
    int32_t *order;
    int64_t *offsets;
} walk_t;

static int qkv_width(const model_t *m) { return (m->heads + 2 * m->kv_heads) * m->head_dim; }

/* Rotate queries and keys in place; `sign` -1 turns them back. */
static void rotate(const model_t *m, float *qkv, const int32_t *positions, int64_t rows, float sign)
{
    int D = m->head_dim, half = D / 2, heads = m->heads + m->kv_heads, width = qkv_width(m);
    for (int64_t row = 0; row < rows; row++) {
        const float *cosine = m->cosines + (int64_t)positions[row] * D, *sine = m->sines + (int64_t)positions[row] * D;
        float *head = qkv + row * width;
        for (int h = 0; h < heads; h++, head += D)
            for (int i = 0; i < half; i += 4) {
                v4 first = *(v4 *)(head + i), second = *(v4 *)(head + half + i);
                *(v4 *)(head + i) = first * *(const v4 *)(cosine + i) + second * *(const v4 *)(sine + i) * sign;
                *(v4 *)(head + half + i) =
                    second * *(const v4 *)(cosine + half + i) + first * *(const v4 *)(sine + half + i) * sign;
            }
    }
}

/* The sums of eight vectors. */
INLINE v8 sums(const v8 *a)
{
    v8 b[4], c[2];
    for (int r = 0; r < 4; r++)
        b[r] = SHUFFLE(a[2 * r], a[2 * r + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               SHUFFLE(a[2 * r], a[2 * r + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int r = 0; r < 2; r++)
        c[r] = SHUFFLE(b[2 * r], b[2 * r + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               SHUFFLE(b[2 * r], b[2 * r + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

/* out[j] = scale · x · (row chain[j] of `rows`) for j < n, and something up to the next multiple of eight. */
INLINE void dots(const float *x, const float *rows, int64_t step, const int32_t *chain, int n, float scale, float *out, int D)
{
    for (int j = 0; j < n; j += 8) {
        v8 sum[8];
        for (int r = 0; r < 8; r++) {
            const float *row = rows + step * chain[j + r < n ? j + r : j];
            sum[r] = *(const v8 *)x * *(const v8 *)row;
            for (int i = 8; i < D; i += 8) sum[r] += *(const v8 *)(x + i) * *(const v8 *)(row + i);
        }
        *(v8 *)(out + j) = sums(sum) * scale;
    }
}

INLINE int ancestors(const int32_t *parents, int32_t row, int32_t *chain)
{
    int n = 0;
    for (; row >= 0; row = parents[row]) chain[n++] = row;
    return n;
}

/* Softmax in place of n numbers, padded to a multiple of 16. */
INLINE void softmax(float *scores, int n)
{
    int padded = (n + 15) & ~15;
    for (int i = n; i < padded; i++) scores[i] = -INFINITY;
    v16 most = *(v16 *)scores, total = {};
    for (int i = 16; i < padded; i += 16) most = select16(*(v16 *)(scores + i) > most, *(v16 *)(scores + i), most);
    float top = most[0];
    for (int i = 1; i < 16; i++) top = MAX(most[i], top);
    for (int i = 0; i < padded; i += 16) total += *(v16 *)(scores + i) = exp16(*(v16 *)(scores + i) - top);
    float inverse = 1.0f / sum16(total);
    for (int i = 0; i < padded; i += 16) *(v16 *)(scores + i) *= inverse;
}

/* Integers that walks over all tokens of a pass and over its outputs need. */
static int64_t walk_numbers(int64_t count) { return 8 * count + 2; }

/* Walks over all tokens and over the outputs, each sequence to its end before the next: ancestors were used just before. */
static void walks(const tokens_t *t, const int64_t *outputs, int64_t num_outputs, int32_t *memory, walk_t *all, walk_t *chosen)
{
    int64_t count = t->count, *offsets = (int64_t *)(((uintptr_t)memory + 7) & ~(uintptr_t)7), total = 0;
    int32_t *order = (int32_t *)(offsets + 2 * count), *child = order + count, *sibling = child + count, *rank = sibling + count;
    int32_t first = -1, row;
    *all = (walk_t){order, offsets}, *chosen = (walk_t){child, offsets + count};
    for (int64_t i = 0; i < count; i++) child[i] = rank[i] = -1, offsets[i] = total, total += t->positions[i] + 1;
    for (int64_t r = 0, sum = 0; r < num_outputs; r++) {
        rank[outputs[r]] = (int32_t)r, chosen->offsets[r] = sum, sum += t->positions[outputs[r]] + 1;
    }
    for (row = (int32_t)count - 1; row >= 0; row--) {
        int32_t parent = t->parents[row], *head = parent < 0 ? &first : &child[parent];
        sibling[row] = *head, *head = row;
    }
    int64_t n = 0;
    for (row = first; row >= 0;) {
        order[n++] = row;
        if (child[row] >= 0) {
            row = child[row];
            continue;
        }
        while (row >= 0 && sibling[row] < 0) row = t->parents[row];
        if (row >= 0) row = sibling[row];
    }
    n = 0;
    for (int64_t i = 0; i < count; i++)
        if (rank[order[i]] >= 0) chosen->order[n++] = rank[order[i]];
}

/* Attention of some tokens (rows relative to `start`; NULL: all) over queries, keys and values of all tokens so far. With
   `keep`, weights stay: those of each token where the walk says, or one token's after the other's without a walk. */
INLINE void attend(const model_t *m, const tokens_t *t, const int64_t *chosen, int64_t rows, const walk_t *walk,
                   const float *qkv, float *all_out, float *all_probs, int keep, int32_t *chain, float *scores, int D)
{
    int width = qkv_width(m), heads = m->heads, shared = m->heads / m->kv_heads;
    float scale = 1.0f / sqrtf((float)D), *probs = all_probs;
    for (int64_t k = 0; k < rows; k++) {
        int64_t r = walk ? walk->order[k] : k;
        int32_t row = (int32_t)(t->start + (chosen ? chosen[r] : r));
        int n = ancestors(t->parents, row, chain);
        float *out = all_out + r * heads * D;
        if (keep && walk) probs = all_probs + walk->offsets[r] * heads;
        for (int h = 0; h < heads; h++, out += D) {
            const float *query = qkv + (int64_t)row * width + h * D, *key = qkv + (heads + h / shared) * D;
            const float *value = key + m->kv_heads * D;
            float *weights = keep ? scores : probs;
            dots(query, key, width, chain, n, scale, weights, D);
            softmax(weights, n);
            v8 sum[MAX_HEAD_DIM / 8] = {};
            for (int j = 0; j < n; j++) {
                const float *v = value + (int64_t)chain[j] * width;
                for (int i = 0; i < D / 8; i++) sum[i] += *(const v8 *)(v + 8 * i) * weights[j];
            }
            for (int i = 0; i < D / 8; i++) *(v8 *)(out + 8 * i) = sum[i];
            if (keep) memcpy(probs, weights, sizeof(float) * n), probs += n;
        }
    }
}

/* d_qkv += the gradients of queries, keys and values. */
INLINE void attend_backward(const model_t *m, const tokens_t *t, const int64_t *chosen, int64_t rows, const walk_t *walk,
                            const float *qkv, const float *all_probs, const float *all_d_out, float *d_qkv, int32_t *chain,
                            float *d_scores, int D)
{
    int width = qkv_width(m), heads = m->heads, shared = m->heads / m->kv_heads;
    float scale = 1.0f / sqrtf((float)D);
    for (int64_t k = 0; k < rows; k++) {
        int64_t r = walk->order[k];
        int32_t row = (int32_t)(chosen ? chosen[r] : r);
        int n = ancestors(t->parents, row, chain);
        const float *d_out = all_d_out + r * heads * D, *probs = all_probs + walk->offsets[r] * heads;
        for (int h = 0; h < heads; h++, d_out += D, probs += n) {
            int64_t query = (int64_t)row * width + h * D, key = (heads + h / shared) * D, value = key + m->kv_heads * D;
            float mean = 0.0f;
            dots(d_out, qkv + value, width, chain, n, 1.0f, d_scores, D);
            for (int j = 0; j < n; j++) mean += d_scores[j] * probs[j];
            v8 d_query[MAX_HEAD_DIM / 8] = {};
            for (int j = 0; j < n; j++) {
                float d = (d_scores[j] - mean) * probs[j] * scale;
                const float *k_row = qkv + (int64_t)chain[j] * width + key;
                float *d_k = d_qkv + (int64_t)chain[j] * width + key, *d_v = d_qkv + (int64_t)chain[j] * width + value;
                for (int i = 0; i < D / 8; i++) {
                    d_query[i] += *(const v8 *)(k_row + 8 * i) * d;
                    *(v8 *)(d_k + 8 * i) += *(const v8 *)(qkv + query + 8 * i) * d;
                    *(v8 *)(d_v + 8 * i) += *(const v8 *)(d_out + 8 * i) * probs[j];
                }
            }
            for (int i = 0; i < D / 8; i++) *(v8 *)(d_qkv + query + 8 * i) += d_query[i];
        }
    }
}

#define BY_HEAD_DIM(call)                                                                                                   \
    switch (m->head_dim) {                                                                                                  \
    case 8: call(8); break;                                                                                                 \
    case 16: call(16); break;                                                                                               \
    case 32: call(32); break;                                                                                               \
    case 64: call(64); break;                                                                                               \
    default: call(m->head_dim);                                                                                             \
    }

static void attention(const model_t *m, const tokens_t *t, const int64_t *chosen, int64_t rows, const walk_t *walk,
                      const float *qkv, float *out, float *probs, int keep, int32_t *chain, float *scores)
{
#define CALL(D) attend(m, t, chosen, rows, walk, qkv, out, probs, keep, chain, scores, D)
    BY_HEAD_DIM(CALL)
#undef CALL
}

static void attention_backward(const model_t *m, const tokens_t *t, const int64_t *chosen, int64_t rows, const walk_t *walk,
                               const float *qkv, const float *probs, const float *d_out, float *d_qkv, int32_t *chain,
                               float *d_scores)
{
#define CALL(D) attend_backward(m, t, chosen, rows, walk, qkv, probs, d_out, d_qkv, chain, d_scores, D)
    BY_HEAD_DIM(CALL)
#undef CALL
}
