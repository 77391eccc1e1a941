// A tower of a side network as Python describes it, the sizes that fit, and the mix of hidden states into its state.
#pragma once

#include "panels.h"

namespace {

// What the caller fills in; all matrices are contiguous. Panel matrices have `total` rows, of which this call works on
// `count` from `start` on.
template <class T> struct Tower {
    int32_t layers, bottleneck, width, embedding;  // K, R, D, d
    int32_t total, start, count, views;
    int32_t gelu, half;             // half: the hidden states are bf16
    const T *gate;                  // [K], or null
    const T *down_weight, *down_bias, *up_weight, *up_bias, *projection;
    const void *hidden[2];          // of each view: panel matrices [K][total, D]
    T *inputs;                      // panel matrices [K][total, D]
    T *before, *after;              // panel matrices [K][total, R]; one and the same for ReLU
    T *projected;                   // [total][d]
    const T *upstream;              // the gradient of `projected`: [total][d]
    T *of_gate;                     // [K], or null; already divided by the temperature
    T *of_down_weight, *of_down_bias, *of_up_weight, *of_up_bias, *of_projection;
    T *of_hidden[2];                // [total][K][D] or null: added to
    double temperature;
    // For `encode` alone: what the bottlenecks below add to each layer's and all of them to the item vectors.
    const T *joined, *joined_bias;                        // [K][R][K R], [K][R]
    const T *joined_projection, *joined_projection_bias;  // [d][K R], [d]
};

// Mixes a panel of the hidden states, H (T or bf16), of 1 or 2 views into the state.
template <class T, class H, int VIEWS> struct Mix {
    const H *h, *other;
    Vector<T> carry, first, second;

    static Row<T> read(const H *row) {
        if constexpr (std::is_same_v<H, T>) return load(row);
        else return widened<T>(row);
    }

    // Row n of the layer's input, from the state before it.
    Row<T> operator()(Row<T> state, int n) const {
        const Row<T> own = read(h + n * PANEL);
        for (int p = 0; p < PARTS<T>; p++) state.part[p] = state.part[p] * carry + own.part[p] * first;
        if constexpr (VIEWS == 2) {
            const Row<T> more = read(other + n * PANEL);
            for (int p = 0; p < PARTS<T>; p++) state.part[p] += more.part[p] * second;
        }
        return state;
    }

    // What the input's gradient meets in the gate's, but for `gate_scale`; x: the input's row n. By one view
    // x = g h + (1 - g) s, and g (1 - g) (h - s) = g (h - x); by two the gate stands between the views.
    Row<T> gate_slope(const T *x, int n) const {
        Row<T> found = read(h + n * PANEL), from;
        if constexpr (VIEWS == 2) from = read(other + n * PANEL);
        else from = load(x);
        for (int p = 0; p < PARTS<T>; p++) found.part[p] -= from.part[p];
        return found;
    }
    T gate_scale() const { return VIEWS == 2 ? first[0] * second[0] : first[0]; }
};

template <class T> bool fits(const Tower<T> &t) {
    const bool positive = t.layers > 0 && t.bottleneck > 0 && t.width > 0 && t.embedding > 0 && t.temperature > 0;
    if (!positive || t.views < 1 || t.views > 2 || !is_part(t.start, t.count, t.total)) return false;
    if (!t.count) return true;
    return t.hidden[0] && (t.views == 1 || t.hidden[1]) && t.inputs && t.before && (t.gelu ? t.after != t.before : t.after == t.before);
}

// `encode` reads bottlenecks as one matrix, which has whole panels.
template <class T> bool can_encode(const Tower<T> &t) {
    return are_panels(t.bottleneck) && t.joined && t.joined_bias && t.joined_projection && t.joined_projection_bias;
}

}  // namespace
