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

/* One layer's parameters, or their gradients, in the order of `LayerWeights`; biases may be NULL. */
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

/* Attention of some tokens (rows relative to `start`; NULL: all) over queries, keys and values of all tokens so far. */
INLINE float *attend(const model_t *m, const tokens_t *t, const int64_t *chosen, int64_t rows, const float *qkv, float *out,
                   float *probs, int keep, int32_t *chain, int D)
{
    int width = qkv_width(m), heads = m->heads, shared = m->heads / m->kv_heads;
    float scale = 1.0f / sqrtf((float)D);
    for (int64_t r = 0; r < rows; r++) {
        int32_t row = (int32_t)(t->start + (chosen ? chosen[r] : r));
        int n = ancestors(t->parents, row, chain);
        for (int h = 0; h < heads; h++, out += D) {
            const float *query = qkv + (int64_t)row * width + h * D, *key = qkv + (heads + h / shared) * D;
            const float *value = key + m->kv_heads * D;
            dots(query, key, width, chain, n, scale, probs, D);
            softmax(probs, n);
            v8 sum[MAX_HEAD_DIM / 8] = {};
            for (int j = 0; j < n; j++) {
                const float *v = value + (int64_t)chain[j] * width;
                for (int i = 0; i < D / 8; i++) sum[i] += *(const v8 *)(v + 8 * i) * probs[j];
            }
            for (int i = 0; i < D / 8; i++) *(v8 *)(out + 8 * i) = sum[i];
            if (keep) probs += n;
        }
    }
    return probs;
}

/* d_qkv += the gradients of queries, keys and values. */
INLINE void attend_backward(const model_t *m, const tokens_t *t, const int64_t *chosen, int64_t rows, const float *qkv,
                            const float *probs, const float *d_out, float *d_qkv, int32_t *chain, float *d_scores, int D)
{
    int width = qkv_width(m), heads = m->heads, shared = m->heads / m->kv_heads;
    float scale = 1.0f / sqrtf((float)D);
    for (int64_t r = 0; r < rows; r++) {
        int32_t row = (int32_t)(chosen ? chosen[r] : r);
        int n = ancestors(t->parents, row, chain);
        for (int h = 0; h < heads; h++, d_out += D, probs += n) {
            int64_t query = (int64_t)row * width + h * D, key = (heads + h / shared) * D, value = key + m->kv_heads * D;
            float mean = 0.0f;
            dots(d_out, qkv + value, width, chain, n, 1.0f, d_scores, D);
            for (int j = 0; j < n; j++) mean += d_scores[j] * probs[j];
            v8 d_query[MAX_HEAD_DIM / 8] = {};
            for (int j = 0; j < n; j++) {
                float d = (d_scores[j] - mean) * probs[j] * scale;
                const float *k = qkv + (int64_t)chain[j] * width + key;
                float *d_k = d_qkv + (int64_t)chain[j] * width + key, *d_v = d_qkv + (int64_t)chain[j] * width + value;
                for (int i = 0; i < D / 8; i++) {
                    d_query[i] += *(const v8 *)(k + 8 * i) * d;
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

static float *attention(const model_t *m, const tokens_t *t, const int64_t *chosen, int64_t rows, const float *qkv, float *out,
                      float *probs, int keep, int32_t *chain)
{
#define CALL(D) probs = attend(m, t, chosen, rows, qkv, out, probs, keep, chain, D)
    BY_HEAD_DIM(CALL)
#undef CALL
    return probs;
}

static void attention_backward(const model_t *m, const tokens_t *t, const int64_t *chosen, int64_t rows, const float *qkv,
                               const float *probs, const float *d_out, float *d_qkv, int32_t *chain, float *d_scores)
{
#define CALL(D) attend_backward(m, t, chosen, rows, qkv, probs, d_out, d_qkv, chain, d_scores, D)
    BY_HEAD_DIM(CALL)
#undef CALL
}
