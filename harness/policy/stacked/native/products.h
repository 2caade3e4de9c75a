/* Products of matrices, blocked for the caches. Each sum over the inner axis runs in order, in blocks of BLOCK: the bits
   depend on neither the sizes of tiles nor the rows beside. Columns are multiples of sixteen. */

#pragma once

#include "row_operations.h"

#if defined(__AVX512F__)
typedef v16 lane;
#define TILE_ROWS 14 /* with two vectors of columns: 28 of 32 registers hold sums */
#elif defined(__AVX__)
typedef v8 lane;
#define TILE_ROWS 6 /* 12 of 16 registers */
#else
typedef v4 lane;
#define TILE_ROWS 6
#endif

#define LANES ((int)(sizeof(lane) / sizeof(float)))
#define BLOCK 256
#define BLOCK_ROWS (8 * TILE_ROWS)

/* A matrix whose element [row, column] is at[row · row_step + column · column_step]. */
typedef struct {
    const float *at;
    int64_t row_step, column_step;
} view_t;

INLINE void tile(int rows, int vectors, view_t a, const float *b, int64_t b_step, int64_t inner, float beta, float *out,
                 int64_t out_step)
{
    lane sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = (lane){};
    for (int64_t k = 0; k < inner; k++, a.at += a.column_step, b += b_step)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += a.at[r * a.row_step] * *(const lane *)(b + LANES * v);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            lane *target = (lane *)(out + r * out_step + LANES * v);
            if (beta == 0.0f) *target = sum[r][v];
            else *target += sum[r][v];
        }
}

static void tile_of(int rows, int vectors, view_t a, const float *b, int64_t b_step, int64_t inner, float beta, float *out,
                    int64_t out_step)
{
#define CASE(r)                                                                                                             \
    case r:                                                                                                                 \
        if (vectors == 2) tile(r, 2, a, b, b_step, inner, beta, out, out_step);                                             \
        else tile(r, 1, a, b, b_step, inner, beta, out, out_step);                                                          \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
    }
#undef CASE
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* out [rows, columns] = a · b, added to what is there where beta is not 0. Tiles of rows are as equal as can be. */
static void product(int64_t rows, int64_t columns, int64_t inner, view_t a, const float *b, float beta, float *out)
{
    for (int64_t k = 0; k < inner; k += BLOCK, beta = 1.0f)
        for (int64_t first = 0; first < rows; first += BLOCK_ROWS) {
            int64_t part = least(rows - first, BLOCK_ROWS), tiles = (part + TILE_ROWS - 1) / TILE_ROWS;
            for (int64_t j = 0; j < columns; j += 2 * LANES)
                for (int64_t t = 0; t < tiles; t++) {
                    int64_t i = first + part * t / tiles, end = first + part * (t + 1) / tiles;
                    view_t at = {a.at + i * a.row_step + k * a.column_step, a.row_step, a.column_step};
                    tile_of((int)(end - i), columns - j < 2 * LANES ? 1 : 2, at, b + k * columns + j, columns,
                            least(inner - k, BLOCK), beta, out + i * columns + j, columns);
                }
        }
}

/* out [columns, rows] = x [rows, columns] turned over, eight by eight; both are multiples of eight. */
static void transpose(const float *x, int64_t rows, int64_t columns, float *out)
{
    for (int64_t i = 0; i < rows; i += 8)
        for (int64_t j = 0; j < columns; j += 8) {
            v8 a[8], b[8];
            for (int r = 0; r < 8; r++) a[r] = *(const v8 *)(x + (i + r) * columns + j);
            for (int r = 0; r < 8; r += 2) {
                b[r] = SHUFFLE(a[r], a[r + 1], 0, 8, 2, 10, 4, 12, 6, 14);
                b[r + 1] = SHUFFLE(a[r], a[r + 1], 1, 9, 3, 11, 5, 13, 7, 15);
            }
            for (int r = 0; r < 8; r++) {
                int q = r & ~2; /* pairs r, r + 2 */
                a[r] = r & 2 ? SHUFFLE(b[q], b[q + 2], 2, 3, 10, 11, 6, 7, 14, 15) : SHUFFLE(b[q], b[q + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            }
            for (int r = 0; r < 4; r++) {
                *(v8 *)(out + (j + r) * rows + i) = SHUFFLE(a[r], a[r + 4], 0, 1, 2, 3, 8, 9, 10, 11);
                *(v8 *)(out + (j + r + 4) * rows + i) = SHUFFLE(a[r], a[r + 4], 4, 5, 6, 7, 12, 13, 14, 15);
            }
        }
}
