// The debiased in-batch cross-entropy of some rows, forward and backward; `reference.row_losses` is its specification.
#include <cmath>
#include <vector>

#include "matrices.h"

namespace {

// What the caller fills in; matrices are row-major. d is a multiple of 16; the rows are those of one part.
template <class T> struct Loss {
    int32_t rows, items, width, words;    // R, V, d, words of history bits a user
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
        product(l.rows, rows_at(l.queries, l.width), packed.data(), PANEL, l.width, [&](int row, Row<T> found) {
            for (int p = 0; p < PARTS<T>; p++) found.part[p] += column.part[p];
            store(l.probabilities + row * wide + v, found);
        });
    }
    for (int row = 0; row < l.rows; row++) {
        T *logits = l.probabilities + row * wide;
        const long target = l.targets[row];
        const T own = logits[target] - (l.multiplicity ? l.multiplicity[target] : T(0));
        if (l.history_bits) {
            const int32_t *bits = l.history_bits + l.row_users[row] * l.words;
            for (int word = 0; word < l.words; word++)
                for (uint32_t left = bits[word]; left; left &= left - 1) {
                    const long v = 32 * word + __builtin_ctz(left);
                    if (v < l.items) logits[v] = -INFINITY;
                }
            logits[target] = own;
        }
        T most = -INFINITY, total = 0;
        for (int v = 0; v < l.items; v++) most = logits[v] > most ? logits[v] : most;
        for (int v = 0; v < l.items; v++) total += logits[v] = std::exp(logits[v] - most);
        l.losses[row] = std::log(total) + most - own;
        const T share = 1 / total;
        for (int v = 0; v < l.items; v++) logits[v] *= share;
        for (long v = l.items; v < wide; v++) logits[v] = 0;
    }
}

template <class T> void backward(const Loss<T> &l) {
    const long wide = panels(l.items) * PANEL;
    std::vector<T> slopes((size_t)l.rows * wide);
    for (int row = 0; row < l.rows; row++) {
        for (long v = 0; v < wide; v++) slopes[row * wide + v] = l.probabilities[row * wide + v] * l.upstream[row];
        slopes[row * wide + l.targets[row]] -= l.upstream[row];
    }
    for (int c = 0; c < l.width; c += PANEL) {
        product(l.rows, rows_at(slopes.data(), wide), l.vectors + c, l.width, l.items,
                [&](int row, const Row<T> &found) { store(l.of_queries + (long)row * l.width + c, found); });
        for (long v = 0; v < l.items; v += PANEL)
            product_of_columns(smaller(PANEL, l.items - v), columns_at(slopes.data() + v, wide), l.queries + c, l.width,
                               l.rows, [&](int row, const Row<T> &found) {
                                   store(l.of_vectors + (v + row) * l.width + c, found);
                               });
    }
}

}  // namespace

extern "C" {
void loss_forward(const Loss<SCALAR> *loss) { forward(*loss); }
void loss_backward(const Loss<SCALAR> *loss) { backward(*loss); }
}
