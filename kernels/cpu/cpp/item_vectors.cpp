// Item vectors, the sum of the towers' projected outputs and of all biases; and the gradient of the biases.
#include "entry.h"

namespace {

template <class T> struct ItemVectors {
    int32_t items, width, towers, room;        // V, d; room: items for which `projected` has memory
    const T *projected, *biases, *bias;        // [towers][room][d], [towers][d], [d]
    T *vectors;                                // [V, d]
    const T *of_vectors;                       // [V, d]
    T *of_bias;                                // [d]: the gradient of `bias`, and of each tower's bias
};

template <class T> void forward(const ItemVectors<T> &i) {
    const long d = i.width;
    for (long v = 0; v < i.items; v++) {
        T *to = i.vectors + v * d;
        for (long c = 0; c < d; c++) to[c] = i.bias[c];
        for (int t = 0; t < i.towers; t++)
            for (long c = 0; c < d; c++) to[c] += i.projected[(t * (long)i.room + v) * d + c] + i.biases[t * d + c];
    }
}

template <class T> void backward(const ItemVectors<T> &i) {
    const long d = i.width;
    for (long c = 0; c < d; c++) i.of_bias[c] = 0;
    for (long v = 0; v < i.items; v++)
        for (long c = 0; c < d; c++) i.of_bias[c] += i.of_vectors[v * d + c];
}

template <class T> bool fits(const ItemVectors<T> &i) {
    return i.items > 0 && i.width > 0 && i.towers > 0 && i.room >= i.items;
}

}  // namespace

EXPORT_SIZE(ItemVectors, ItemVectors<SCALAR>)

extern "C" {
int32_t item_vectors(const ItemVectors<SCALAR> *items) {
    return guarded(fits(*items), [&] { forward(*items); });
}
int32_t item_vectors_backward(const ItemVectors<SCALAR> *items) {
    return guarded(fits(*items) && items->of_vectors, [&] { backward(*items); });
}
}
