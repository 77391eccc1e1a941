// The debiased in-batch cross-entropy of a part of the rows, forward and backward.
// `kernels/reference/inbatch_cross_entropy.py` is its specification.
#include <cmath>
#include <vector>

#include "matrices.h"

namespace {

// The arguments of a call; matrices are row-major, d is a multiple of 16, and R is the number of rows of this part.
template <class T> struct Loss {
    int32_t rows, items, width, words;    // R, V, d, words of history bits of a user
    const T *queries, *vectors;           // [R, d], [V, d]
    const int64_t *targets, *row_users;   // [R]
    const int32_t *history_bits;          // [users, words], or null
    const T *column, *multiplicity;       // [V]: log m - log p, and log m; or null
    T *probabilities;                     // [R, V up to a multiple of 16]
    T *losses;                            // [R]
    const T *upstream;                    // [R]
    T *of_queries, *of_vectors;           // [R, d], [V, d]
};

template <class T> void forward(const Loss<T> &l) {
    const long wide = panels(l.items) * PANEL;
    std::vector<T> packed((size_t)PANEL * l.width);
    for (long v = 0; v < wide; v += PANEL) {
        const int here = smaller(PANEL, l.items - v);
        const Row<T> column = l.column ? get(l.column + v, here) : Row<T>{};
        pack_transposed(packed.data(), l.vectors + v * l.width, l.width, here, l.width);
        product(l.rows, rows_at(l.queries, l.width), packed.data(), PANEL, l.width, [&](int row, Row<T> logits) INLINED {
            add(logits, column);
            store(l.probabilities + row * wide + v, logits);
        });
    }
    for (int row = 0; row < l.rows; row++) {
        T *logits = l.probabilities + row * wide;
        const long target = l.targets[row];
        const T target_logit = logits[target] - (l.multiplicity ? l.multiplicity[target] : T(0));
        if (l.history_bits) {
            const int32_t *bits = l.history_bits + l.row_users[row] * l.words;
            for (int word = 0; word < l.words; word++)
                for (uint32_t left = bits[word]; left; left &= left - 1) {
                    const long v = 32 * word + __builtin_ctz(left);
                    if (v < l.items) logits[v] = -INFINITY;
                }
            logits[target] = target_logit;
        }
        T most = -INFINITY;
        for (int v = 0; v < l.items; v++) most = logits[v] > most ? logits[v] : most;
        for (int v = 0; v < l.items; v++) logits[v] = std::exp(logits[v] - most);
        const T total = sum(logits, l.items);
        l.losses[row] = std::log(total) + most - target_logit;
        const T share = 1 / total;
        for (int v = 0; v < l.items; v++) logits[v] *= share;
        for (long v = l.items; v < wide; v++) logits[v] = 0;
    }
}

// For each panel of 16 items: the gradients of their logits, and with them those of the items and the queries.
template <class T> void backward(const Loss<T> &l) {
    const long wide = panels(l.items) * PANEL;
    if (!l.rows) return clear(l.of_vectors, (long)l.items * l.width);
    std::vector<T> slopes((size_t)l.rows * PANEL);
    clear(l.of_queries, (long)l.rows * l.width);
    for (long v = 0; v < wide; v += PANEL) {
        const int here = smaller(PANEL, l.items - v);
        for (int row = 0; row < l.rows; row++) {
            T *slope = slopes.data() + (long)row * PANEL;
            for (int c = 0; c < PANEL; c++) slope[c] = l.probabilities[row * wide + v + c] * l.upstream[row];
            const long target = l.targets[row] - v;
            if (target >= 0 && target < PANEL) slope[target] -= l.upstream[row];
        }
        for (int c = 0; c < l.width; c += PANEL) {
            product_of_columns(here, columns_of(slopes.data()), l.queries + c, l.width, l.rows,
                               [&](int row, const Row<T> &products) INLINED {
                                   store(l.of_vectors + (v + row) * l.width + c, products);
                               });
            product(l.rows, rows_of(slopes.data(), l.rows), l.vectors + v * l.width + c, l.width, here,
                    [&](int row, Row<T> products) INLINED {
                        T *to = l.of_queries + (long)row * l.width + c;
                        add(products, load(to));
                        store(to, products);
                    });
        }
    }
}

// The constants of a batch's loss: for each item log m and log m - log p, for each row the gradient of its loss.
template <class T> struct Columns {
    int32_t rows, items;                      // R, V
    const int64_t *distinct, *multiplicity;   // [V]: numbers of the items in the catalogue, and m
    const double *log_popularity;             // [items of the catalogue + 1]
    const double *row_weights;                // [R]
    T *log_multiplicity, *column;             // [V]: log m, and log m - log p
    T *of_row_losses;                         // [R]: the row losses' gradient
};

template <class T> void columns(const Columns<T> &c) {
    for (int row = 0; row < c.rows; row++) c.of_row_losses[row] = c.row_weights[row];
    for (int v = 0; v < c.items; v++) {
        c.log_multiplicity[v] = std::log(T(c.multiplicity[v]));
        c.column[v] = c.log_multiplicity[v] - T(c.log_popularity[c.distinct[v]]);
    }
}

// True if there are items when there are rows, and history bits, if given, cover all items.
template <class T> bool fits(const Loss<T> &l) {
    const bool masked = l.history_bits != nullptr;
    return are_panels(l.width) && l.rows >= 0 && l.items >= (l.rows > 0) &&
           (masked ? l.words >= (l.items + 31) / 32 && (!l.rows || l.row_users) : l.words == 0);
}

}  // namespace

EXPORT_SIZE(Loss, Loss<SCALAR>)
EXPORT_SIZE(Columns, Columns<SCALAR>)

extern "C" {
int32_t loss_columns(const Columns<SCALAR> *columns_of) {
    return guarded(columns_of->rows > 0 && columns_of->items > 0, [&] { columns(*columns_of); });
}
int32_t loss_forward(const Loss<SCALAR> *loss) {
    return guarded(fits(*loss), [&] { forward(*loss); });
}
int32_t loss_backward(const Loss<SCALAR> *loss) {
    return guarded(fits(*loss) && (!loss->rows || loss->upstream), [&] { backward(*loss); });
}
}
