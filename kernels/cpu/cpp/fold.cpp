// Multiplies chains of three linear maps, outer [d, d'] times middle [d', H] times inner [H, D], and computes their
// gradients; middle and inner have biases.
//
// `inner` is by far the largest and is not in the cache at the start of a step. So it is read once, row by row, and the
// workers divide its rows. `pair` is (outer middle) transposed, [H, d].
#include <memory>

#include "matrices.h"

namespace {

constexpr int ROWS = 96;  // rows of `inner` that are multiplied together, so that they stay in the cache

// The arguments of a call on `count` rows of `inner` from `start` on. All matrices are contiguous except `outer` and its
// gradient, whose rows are `stride` numbers apart.
template <class T> struct Fold {
    int32_t start, count;
    int32_t outputs, between, rows, width, stride;  // d, d', H, D
    const T *outer, *middle, *middle_bias, *inner, *inner_bias;
    T *pair;               // [H, d]
    T *constant;           // [d']: middle inner_bias + middle_bias; like `bias` written by the call with start 0
    T *product;            // [d, D]: the part of outer middle inner from these rows
    T *bias;               // [d]
    const T *upstream, *of_bias;
    T *of_outer;           // [d, d']: the part of the gradient from these rows
    T *of_middle, *of_middle_bias, *of_inner, *of_inner_bias;
};

// Writes these rows of `pair`, and their part of `product`; the first call also `constant` and `bias`.
template <class T> void forward(const Fold<T> &f) {
    const int d = f.outputs;
    std::unique_ptr<T[]> sums(new T[(size_t)f.width * d]()), packed(new T[(size_t)PANEL * (ROWS + f.between)]);
    T *pair = f.pair + (long)f.start * d;
    const T *inner = f.inner + (long)f.start * f.width;
    for (int o = 0; o < d; o += PANEL) {
        pack_transposed(packed.get(), f.outer + (long)o * f.stride, f.stride, PANEL, f.between);
        product(f.count, columns_at(f.middle + f.start, f.rows), packed.get(), PANEL, f.between,
                [=](int row, const Row<T> &products) INLINED { store(pair + (long)row * d + o, products); });
    }
    for (int start = 0; start < f.count; start += ROWS) {
        const int steps = smaller(ROWS, f.count - start);
        for (int c = 0; c < f.width; c += PANEL) {
            const T *block = inner + (long)start * f.width + c;
            T *to = sums.get() + (size_t)c * d;
            pack(packed.get(), block, f.width, PANEL, steps);
            // The rows of the next panel lie far apart, and the hardware does not prefetch them.
            for (int k = 0; k < steps; k++) __builtin_prefetch(block + (long)k * f.width + PANEL);
            product(d, columns_at(pair + (long)start * d, d), packed.get(), PANEL, steps,
                    [=](int row, Row<T> products) INLINED {
                        add(products, load(to + row * PANEL));
                        store(to + row * PANEL, products);
                    });
        }
    }
    for (int row = 0; row < d; row++)
        for (int c = 0; c < f.width; c += PANEL)
            store(f.product + (long)row * f.width + c, load(sums.get() + (size_t)c * d + row * PANEL));
    if (f.start) return;
    for (int i = 0; i < f.between; i++)
        f.constant[i] = f.middle_bias[i] + dot(f.middle + (long)i * f.rows, f.inner_bias, f.rows);
    for (int o = 0; o < d; o++) f.bias[o] = dot(f.outer + (long)o * f.stride, f.constant, f.between);
}

// Writes the gradients of these rows of `inner` and its bias and of these columns of `middle`, and a part of `of_outer`.
template <class T> void backward(const Fold<T> &f) {
    const int d = f.outputs;
    // columns: upstream in panels of its columns; rows: upstream transposed, in panels of its rows.
    std::unique_ptr<T[]> columns(new T[(size_t)f.width * d]), rows(new T[(size_t)f.width * d]);
    std::unique_ptr<T[]> of_pair(new T[(size_t)f.count * d]), packed(new T[(size_t)PANEL * (f.count + d)]);
    for (int c = 0; c < f.width; c += PANEL)
        pack(columns.get() + (size_t)c * d, f.upstream + c, f.width, PANEL, d);
    for (int o = 0; o < d; o += PANEL)
        pack_transposed(rows.get() + (size_t)o * f.width, f.upstream + (long)o * f.width, f.width, PANEL, f.width);
    for (int start = 0; start < f.count; start += ROWS) {
        const int here = smaller(ROWS, f.count - start);
        const long row = f.start + start;
        for (int o = 0; o < d; o += PANEL) {
            T *to = of_pair.get() + (long)start * d + o;
            product(here, rows_at(f.inner + row * f.width, f.width), rows.get() + (size_t)o * f.width, PANEL, f.width,
                    [=](int i, const Row<T> &products) INLINED { store(to + (long)i * d, products); });
        }
        for (int c = 0; c < f.width; c += PANEL) {
            T *to = f.of_inner + row * f.width + c;
            product(here, rows_at(f.pair + row * d, d), columns.get() + (size_t)c * d, PANEL, d,
                    [=](int i, const Row<T> &products) INLINED { store(to + (long)i * f.width, products); });
        }
    }
    for (int row = f.start; row < f.start + f.count; row++)
        f.of_inner_bias[row] = dot(f.pair + (long)row * d, f.of_bias, d);
    std::unique_ptr<T[]> of_constant(new T[f.between]());
    for (int o = 0; o < d; o++)
        for (int i = 0; i < f.between; i++) of_constant[i] += f.of_bias[o] * f.outer[(long)o * f.stride + i];
    if (!f.start) std::memcpy(f.of_middle_bias, of_constant.get(), sizeof(T) * f.between);
    for (int i = 0; i < f.between; i += PANEL) {
        const int here = smaller(PANEL, f.between - i);
        const Row<T> constant = f.start ? Row<T>{} : get(f.constant + i, here);
        pack_transposed(packed.get(), f.middle + (long)i * f.rows + f.start, f.rows, here, f.count);
        product(d, columns_at<T>(of_pair.get(), d), packed.get(), PANEL, f.count,
                [&](int o, Row<T> products) INLINED {
                    for (int p = 0; p < PARTS<T>; p++) products.part[p] += f.of_bias[o] * constant.part[p];
                    put(f.of_outer + (long)o * f.stride + i, products, here);
                });
    }
    for (int row = 0; row < f.count; row += PANEL) {
        const int here = smaller(PANEL, f.count - row);
        const Row<T> bias = get(f.inner_bias + f.start + row, here);
        pack_transposed(packed.get(), of_pair.get() + (long)row * d, d, here, d);
        product(f.between, columns_at(f.outer, f.stride), packed.get(), PANEL, d,
                [&](int i, Row<T> products) INLINED {
                    for (int p = 0; p < PARTS<T>; p++) products.part[p] += of_constant[i] * bias.part[p];
                    put(f.of_middle + (long)i * f.rows + f.start + row, products, here);
                });
    }
}

template <class T> bool fits(const Fold<T> &f) {
    return are_panels(f.outputs) && are_panels(f.width) && f.between > 0 && f.rows > 0 && f.stride >= f.between &&
           is_part(f.start, f.count, f.rows);
}

}  // namespace

EXPORT_SIZE(Fold, Fold<SCALAR>)

extern "C" {
int32_t fold_forward(const Fold<SCALAR> *fold) {
    return guarded(fits(*fold) && fold->product && fold->bias, [&] { forward(*fold); });
}
int32_t fold_backward(const Fold<SCALAR> *fold) {
    return guarded(fits(*fold) && fold->upstream && fold->of_bias, [&] { backward(*fold); });
}
}
