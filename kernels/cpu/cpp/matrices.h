// Products of row-major matrices whose widths are multiples of 16.
#pragma once

#include "panels.h"

namespace {

// The rows of a matrix as the left operand; the product sums over its columns.
template <class T> inline Operand<T> rows_at(const T *matrix, long width) { return {matrix, width, 1}; }

// The columns of a matrix as rows of the left operand; the product sums over its rows.
template <class T> inline Operand<T> columns_at(const T *matrix, long width) { return {matrix, 1, width}; }

// Writes y = x weight^T + bias for x [n, inputs], weight [outputs, inputs] and y [n, outputs], whose rows are `stride`
// apart. `packed` has room for 16 * inputs numbers.
template <class T>
void linear(int n, const T *x, int inputs, const T *weight, const T *bias, int outputs, T *y, long stride, T *packed) {
    for (int o = 0; o < outputs; o += PANEL) {
        const Row<T> constant = bias ? load(bias + o) : Row<T>{};
        pack_transposed(packed, weight + (long)o * inputs, inputs, PANEL, inputs);
        product(n, rows_at(x, inputs), packed, PANEL, inputs, [&](int row, Row<T> products) INLINED {
            add(products, constant);
            store(y + row * stride + o, products);
        });
    }
}

// The backward of `linear`: adds of_y weight to of_x, and writes of_weight and, unless null, of_bias. The rows of of_y are
// `stride` apart.
template <class T>
void linear_backward(
    int n, const T *x, int inputs, const T *weight, int outputs, const T *of_y, long stride, T *of_x, T *of_weight,
    T *of_bias) {
    for (int i = 0; i < inputs; i += PANEL)
        product(n, rows_at(of_y, stride), weight + i, inputs, outputs, [&](int row, Row<T> products) INLINED {
            T *to = of_x + (long)row * inputs + i;
            add(products, load(to));
            store(to, products);
        });
    for (int o = 0; o < outputs; o += PANEL) {
        for (int i = 0; i < inputs; i += PANEL)
            product_of_columns(PANEL, columns_at(of_y + o, stride), x + i, inputs, n,
                               [&](int row, const Row<T> &products) INLINED {
                                   store(of_weight + (long)(o + row) * inputs + i, products);
                               });
        if (!of_bias) continue;
        Row<T> total = {};
        for (int row = 0; row < n; row++)
            add(total, load(of_y + row * stride + o));
        store(of_bias + o, total);
    }
}

}  // namespace
