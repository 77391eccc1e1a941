// The arguments of a call on a tower of a side network, the check of its sizes, and the mix of hidden states.
#pragma once

#include "panels.h"

namespace {

// The arguments of a call; all matrices are contiguous. Panel matrices have `total` rows, one for each item; this call
// works on `count` items from `start` on.
template <class T> struct Tower {
    int32_t layers, bottleneck, width, embedding;  // K, R, D, d
    int32_t total, start, count, views;
    int32_t gelu, half;             // gelu: GELU instead of ReLU; half: the hidden states are bf16
    const T *gate;                  // [K], or null
    const T *down_weight, *down_bias, *up_weight, *up_bias, *projection;
    const void *hidden[2];          // hidden states of each view: panel matrices [K][total, D]
    T *inputs;                      // input of each layer's SANB: panel matrices [K][total, D]
    T *before, *after;              // bottlenecks before and after the activation: panel matrices [K][total, R]; equal
                                    // pointers for ReLU
    T *projected;                   // [total][d]
    const T *upstream;              // the gradient of `projected`: [total][d]
    T *of_gate;                     // [K], or null
    T *of_down_weight, *of_down_bias, *of_up_weight, *of_up_bias, *of_projection;
    T *of_hidden[2];                // [total][K][D] or null: added to
    double temperature;
    // Read by `encode` alone; composites.py describes them.
    const T *joined, *joined_bias;                        // [K][R][K R], [K][R]
    const T *joined_projection, *joined_projection_bias;  // [d][K R], [d]
};

// Mixes a panel of the hidden states of one or two VIEWS, of type H (T or bf16), into the state.
template <class T, class H, int VIEWS> struct Mix {
    const H *h, *other;
    Vector<T> carry, first, second;

    static Row<T> read(const H *row) {
        if constexpr (std::is_same_v<H, T>) return load(row);
        else return widened<T>(row);
    }

    // Returns row n of the layer's input, carry state + first h + second other, from the previous state.
    Row<T> operator()(Row<T> state, int n) const {
        const Row<T> hidden = read(h + n * PANEL);
        for (int p = 0; p < PARTS<T>; p++) state.part[p] = state.part[p] * carry + hidden.part[p] * first;
        if constexpr (VIEWS == 2) {
            const Row<T> more = read(other + n * PANEL);
            for (int p = 0; p < PARTS<T>; p++) state.part[p] += more.part[p] * second;
        }
        return state;
    }

    // Returns the derivative of row n of the input, x, in the gate's logit, divided by `gate_scale`. Over one view
    // x = g h + (1 - g) s, and the derivative is g (1 - g) (h - s) = g (h - x); over two views it is g (1 - g) (h - other).
    Row<T> gate_slope(const T *x, int n) const {
        Row<T> slope = read(h + n * PANEL), from;
        if constexpr (VIEWS == 2) from = read(other + n * PANEL);
        else from = load(x);
        for (int p = 0; p < PARTS<T>; p++) slope.part[p] -= from.part[p];
        return slope;
    }
    T gate_scale() const { return VIEWS == 2 ? first[0] * second[0] : first[0]; }
};

template <class T> bool fits(const Tower<T> &t) {
    const bool positive = t.layers > 0 && t.bottleneck > 0 && t.width > 0 && t.embedding > 0 && t.temperature > 0;
    if (!positive || t.views < 1 || t.views > 2 || !is_part(t.start, t.count, t.total)) return false;
    if (!t.count) return true;
    return t.hidden[0] && (t.views == 1 || t.hidden[1]) && t.inputs && t.before && (t.gelu ? t.after != t.before : t.after == t.before);
}

// True if `encode` can run: it reads all bottlenecks as one matrix of whole panels.
template <class T> bool can_encode(const Tower<T> &t) {
    return are_panels(t.bottleneck) && t.joined && t.joined_bias && t.joined_projection && t.joined_projection_bias;
}

}  // namespace
