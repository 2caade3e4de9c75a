/* What works on single rows of float32 numbers: norms, biases, activations, the exponential. See `transformer.c`.

   Sums run in a fixed order over vectors of sixteen numbers, whatever the processor's width. Widths are multiples of
   sixteen. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define SHUFFLE __builtin_shufflevector

typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));

INLINE float sum8(v8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

INLINE float sum16(v16 v)
{
    v8 low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (const float *)&v + 8, sizeof high);
    return sum8(low + high);
}

INLINE v16 select16(i16 mask, v16 a, v16 b)
{
    i16 x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    x = (x & mask) | (y & ~mask);
    memcpy(&a, &x, sizeof a);
    return a;
}

/* e^x to two units in the last place; 0 below -87, and not a number where x is none. */
INLINE v16 exp16(v16 x)
{
    const v16 low = (v16){} - 87.33f, high = (v16){} + 88.37f;
    v16 y = select16(x < low, low, x);
    y = select16(y > high, high, y);
    v16 n = y * 1.44269504f + 12582912.0f; /* 1.5 · 2^23: the sum has no bits left for a fraction */
    i16 exponent;
    memcpy(&exponent, &n, sizeof exponent);
    exponent = (exponent << 23) + (127 << 23);
    n -= 12582912.0f;
    v16 r = y - n * 0.693359375f + n * 2.12194440e-4f;
    v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    v16 scale;
    memcpy(&scale, &exponent, sizeof scale);
    return select16(x < low, (v16){}, p * scale);
}

/* h = scale · x / rms(x), row by row. */
static void rms_forward(const float *x, const float *scale, int64_t rows, int width, float eps, float *inverse, float *h)
{
    for (int64_t row = 0; row < rows; row++, x += width, h += width) {
        v16 squares = {};
        for (int i = 0; i < width; i += 16) squares += *(const v16 *)(x + i) * *(const v16 *)(x + i);
        inverse[row] = 1.0f / sqrtf(sum16(squares) / width + eps);
        for (int i = 0; i < width; i += 16)
            *(v16 *)(h + i) = *(const v16 *)(x + i) * inverse[row] * *(const v16 *)(scale + i);
    }
}

#define SUMMED 256
/* Rows whose sum is taken before it is added to the rows before: a sum over all of them one by one would lose digits. */

/* sum [width] += part [width]; part = 0. */
static void collect(float *part, int width, float *sum)
{
    for (int i = 0; i < width; i += 16) {
        *(v16 *)(sum + i) += *(v16 *)(part + i);
        *(v16 *)(part + i) = (v16){};
    }
}

/* grad += the gradient of x, and d_scale = that of the scale, from that of h; `part` is of no meaning. */
static void rms_backward(const float *d_h, const float *x, const float *inverse, const float *scale, int64_t rows, int width,
                         float *grad, float *d_scale, float *part)
{
    memset(d_scale, 0, sizeof(float) * width);
    memset(part, 0, sizeof(float) * width);
    for (int64_t row = 0; row < rows; row++, x += width, d_h += width, grad += width) {
        v16 dot = {};
        for (int i = 0; i < width; i += 16) {
            v16 y = *(const v16 *)(x + i) * inverse[row], d = *(const v16 *)(d_h + i);
            *(v16 *)(part + i) += d * y;
            dot += d * *(const v16 *)(scale + i) * y;
        }
        float mean = sum16(dot) / width;
        for (int i = 0; i < width; i += 16) {
            v16 y = *(const v16 *)(x + i) * inverse[row];
            *(v16 *)(grad + i) += (*(const v16 *)(d_h + i) * *(const v16 *)(scale + i) - y * mean) * inverse[row];
        }
        if (row % SUMMED == SUMMED - 1 || row == rows - 1) collect(part, width, d_scale);
    }
}

static void add_bias(float *y, const float *bias, int64_t rows, int width)
{
    for (; bias && rows > 0; rows--, y += width)
        for (int i = 0; i < width; i += 16) *(v16 *)(y + i) += *(const v16 *)(bias + i);
}

/* d_bias = the sum of rows; `part` is of no meaning. */
static void bias_backward(const float *grad, int64_t rows, int width, float *d_bias, float *part)
{
    if (!d_bias) return;
    memset(d_bias, 0, sizeof(float) * width);
    memset(part, 0, sizeof(float) * width);
    for (int64_t row = 0; row < rows; row++, grad += width) {
        for (int i = 0; i < width; i += 16) *(v16 *)(part + i) += *(const v16 *)(grad + i);
        if (row % SUMMED == SUMMED - 1 || row == rows - 1) collect(part, width, d_bias);
    }
}

/* act = silu(gate) · up, the gate in the first half of gate_up. */
static void swiglu(const float *gate_up, int64_t rows, int width, float *act)
{
    for (int64_t row = 0; row < rows; row++, gate_up += 2 * width, act += width)
        for (int i = 0; i < width; i += 16) {
            v16 gate = *(const v16 *)(gate_up + i), up = *(const v16 *)(gate_up + width + i);
            *(v16 *)(act + i) = gate / (exp16(-gate) + 1.0f) * up;
        }
}

static void swiglu_backward(const float *gate_up, const float *d_act, int64_t rows, int width, float *d_gate_up)
{
    for (int64_t row = 0; row < rows; row++, gate_up += 2 * width, d_gate_up += 2 * width, d_act += width)
        for (int i = 0; i < width; i += 16) {
            v16 gate = *(const v16 *)(gate_up + i), up = *(const v16 *)(gate_up + width + i);
            v16 d = *(const v16 *)(d_act + i), sigmoid = 1.0f / (exp16(-gate) + 1.0f);
            *(v16 *)(d_gate_up + width + i) = d * gate * sigmoid;
            *(v16 *)(d_gate_up + i) = d * up * sigmoid * ((1.0f - sigmoid) * gate + 1.0f);
        }
}

static void gather(const float *x, const int64_t *chosen, int64_t rows, int width, float *out)
{
    for (int64_t r = 0; r < rows; r++) memcpy(out + r * width, x + chosen[r] * width, sizeof(float) * width);
}

/* The inverse of `gather` in place, for ascending rows: zeros where none was taken. */
static void spread(float *x, const int64_t *chosen, int64_t rows, int64_t total, int width)
{
    for (int64_t r = rows - 1, end = total; r >= -1; r--) {
        int64_t at = r < 0 ? -1 : chosen[r];
        if (r >= 0) memmove(x + at * width, x + r * width, sizeof(float) * width);
        memset(x + (at + 1) * width, 0, sizeof(float) * (end - at - 1) * width);
        end = at;
    }
}
