// A tower of a side network over a range of items, forward and backward, in passes over blocks of the state's columns.
//
// A pass computes a block of columns of a layer's state and uses it while it is in the cache: the forward adds its product
// to the bottleneck, the backward computes the gradients of the weights that multiply it. So each layer's state is read
// and written once. The projection H after the last layer gives H (x + U a + b) = H x + (H U) a + H b: H U is computed
// first, and the output of width D is never formed. `kernels/reference/side_towers.py` is the specification; the names
// are the same.
#include <cmath>
#include <memory>

#include "tower.h"

namespace {

// The computation of one call.
template <class T> class Pass {
  public:
    explicit Pass(const Tower<T> &tower)
        : t(tower), wide(panels(t.width)), narrow(panels(t.bottleneck)), out(panels(t.embedding)), last(t.layers - 1),
          packed(new T[(size_t)PANEL * (t.width + t.layers * t.bottleneck + t.embedding + BLOCK * PANEL)]),
          mixes(new Weights[t.layers]) {
        for (int k = 0; k < t.layers; k++) {
            const double gate = t.gate ? 1 / (1 + std::exp(-t.gate[k] / t.temperature)) : 1;
            const double other = t.gate ? 1 - gate : 1;
            mixes[k] = {T(t.views == 2 ? 1 : other), T(gate), T(other)};
        }
    }

    void forward() {
        std::unique_ptr<T[]> embedding(new T[(size_t)out * t.count * PANEL]());
        for (int k = 0; k < t.layers; k++) {
            T *bottleneck = before(k);
            fill(bottleneck, t.down_bias + (long)k * t.bottleneck, t.bottleneck);
            const T *weight = t.down_weight + (long)k * t.bottleneck * t.width;
            for (int block = 0; block < wide; block += BLOCK) {
                for (int j = block; j < smaller(wide, block + BLOCK); j++) mix(k, j);
                add_product(bottleneck, input(k, block), weight, block, t.bottleneck, t.total);
                if (k == last) add_product(embedding.get(), input(k, block), t.projection, block, t.embedding, t.count);
            }
            activate(k);
        }
        project(embedding.get());
    }

    // Writes the projected outputs if no backward follows. A tower's state is a mix of hidden states, which `inputs`
    // [1][total, D] holds, and a sum of up-projections; `joined` has the products of the up-projections with the maps that
    // follow them, so that each bottleneck is computed from the mix and the bottlenecks below.
    void encode() {
        const int r = t.bottleneck, all = t.layers * r;
        std::unique_ptr<T[]> embedding(new T[(size_t)out * t.count * PANEL]);
        for (int q = 0; q < out; q++) {
            const Row<T> bias = get(t.joined_projection_bias + q * PANEL, columns(t.embedding, q));
            for (int n = 0; n < t.count; n++) store(embedding.get() + ((long)q * t.count + n) * PANEL, bias);
        }
        for (int k = 0; k < t.layers; k++) {
            fill(before(k), t.joined_bias + (long)k * r, r);
            for (int block = 0; block < wide; block += BLOCK) {
                for (int j = block; j < smaller(wide, block + BLOCK); j++) mix_hidden(k, j);
                add_product(before(k), input(0, block), t.down_weight + (long)k * r * t.width, block, r, t.total);
                if (k == last) add_product(embedding.get(), input(0, block), t.projection, block, t.embedding, t.count);
            }
            if (k) add_bottlenecks(before(k), t.joined + (long)k * r * all, all, r, k * r, t.total);
            activate(k);
        }
        add_bottlenecks(embedding.get(), t.joined_projection, all, t.embedding, all, t.count);
        for (int q = 0; q < out; q++)
            for (int n = 0; n < t.count; n++)
                put(t.projected + (long)(t.start + n) * t.embedding + q * PANEL,
                    load(embedding.get() + ((long)q * t.count + n) * PANEL), columns(t.embedding, q));
    }

    void backward() {
        gradient.reset(new T[(size_t)wide * t.count * PANEL]);
        of_after.reset(new T[(size_t)narrow * t.count * PANEL]);
        of_before.reset(new T[(size_t)narrow * t.count * PANEL]);
        project_backward();
        for (int k = t.layers - 1; k >= 0; k--) {
            through_activation(k);
            std::memset(of_after.get(), 0, sizeof(T) * narrow * t.count * PANEL);
            double gate = 0;
            for (int block = 0; block < wide; block += BLOCK) {
                for (int j = block; j < smaller(wide, block + BLOCK); j++) gate += through_down(k, j);
                if (k) through_up(k - 1, block);
            }
            if (t.of_gate) t.of_gate[k] = gate / t.temperature;
        }
    }

  private:
    struct Weights {  // a layer's input is carry state + first h + second other
        T carry, first, second;
    };

    const Tower<T> &t;
    const int wide, narrow, out;  // numbers of panels of the state, of a bottleneck, of an item vector
    const int last;               // number of the last layer
    std::unique_ptr<T[]> packed;  // a right operand of a product
    std::unique_ptr<Weights[]> mixes;
    std::unique_ptr<T[]> gradient;             // gradient of the state: a panel matrix [count, D]
    std::unique_ptr<T[]> of_after, of_before;  // gradients of a layer's bottleneck: panel matrices [count, R]

    static int columns(int all, int panel) { return smaller(PANEL, all - panel * PANEL); }
    T *panel(T *matrices, int k, int panels_each, int j) const {
        return matrices + (((long)k * panels_each + j) * t.total + t.start) * PANEL;
    }
    T *input(int k, int j) const { return panel(t.inputs, k, wide, j); }
    T *before(int k, int q = 0) const { return panel(t.before, k, narrow, q); }
    T *after(int k, int q = 0) const { return panel(t.after, k, narrow, q); }
    T *state_gradient(int j) const { return gradient.get() + (long)j * t.count * PANEL; }
    const T *last_up_weight(long row) const { return t.up_weight + (last * (long)t.width + row) * t.bottleneck; }
    const T *last_up_bias() const { return t.up_bias + last * (long)t.width; }

    // Returns use(mix of layer k and panel j). The mix has one of four types, so that no row has to test which.
    template <class F> auto with_mix(int k, int j, F use) const {
        if (t.half) return t.views == 2 ? use(mix_of<uint16_t, 2>(k, j)) : use(mix_of<uint16_t, 1>(k, j));
        return t.views == 2 ? use(mix_of<T, 2>(k, j)) : use(mix_of<T, 1>(k, j));
    }
    template <class H, int VIEWS> Mix<T, H, VIEWS> mix_of(int k, int j) const {
        const long at = (((long)k * wide + j) * t.total + t.start) * PANEL;
        const Weights &weights = mixes[k];
        return {(const H *)t.hidden[0] + at, VIEWS == 2 ? (const H *)t.hidden[1] + at : nullptr,
                broadcast(weights.carry), broadcast(weights.first), broadcast(weights.second)};
    }

    void fill(T *matrix, const T *bias, int width) const {
        for (int q = 0; q < panels(width); q++) {
            const Row<T> row = get(bias + q * PANEL, columns(width, q));
            for (int n = 0; n < t.count; n++) store(matrix + ((long)q * t.total + n) * PANEL, row);
        }
    }

    // Writes panel j of layer k's input: the state of the layer below, mixed with the hidden states.
    void mix(int k, int j) {
        with_mix(k, j, [&](auto mixed) {
            T *to = input(k, j);
            if (!k) {
                for (int n = 0; n < t.count; n++) store(to + n * PANEL, mixed(Row<T>{}, n));
                return;
            }
            const int r = t.bottleneck, here = columns(t.width, j);
            const long layer = k - 1, from = (long)j * PANEL;
            const Row<T> bias = get(t.up_bias + layer * t.width + from, here);
            const T *x = input(k - 1, j);
            pack_transposed(packed.get(), t.up_weight + (layer * t.width + from) * r, r, here, r);
            product(t.count, rows_of(after(k - 1), t.total), packed.get(), PANEL, r, [=](int n, Row<T> products) INLINED {
                const Row<T> state = load(x + n * PANEL);
                for (int p = 0; p < PARTS<T>; p++) products.part[p] += state.part[p] + bias.part[p];
                store(to + n * PANEL, mixed(products, n));
            });
        });
    }

    // Replaces panel j of the hidden states' mix up to layer k - 1 by that up to layer k.
    void mix_hidden(int k, int j) {
        with_mix(k, j, [&](auto mixed) {
            T *to = input(0, j);
            for (int n = 0; n < t.count; n++)
                store(to + n * PANEL, mixed(k ? load(to + n * PANEL) : Row<T>{}, n));
        });
    }

    // Adds to `to` [., outputs] the first `steps` numbers of the bottlenecks times weight [outputs, steps]^T, whose rows are
    // `stride` apart. `rows` is the number of rows of `to`.
    void add_bottlenecks(T *to, const T *weight, int stride, int outputs, int steps, int rows) {
        for (int q = 0; q < panels(outputs); q++) {
            T *sums = to + (long)q * rows * PANEL;
            pack_transposed(packed.get(), weight + (long)q * PANEL * stride, stride, columns(outputs, q), steps);
            product(t.count, rows_of(after(0), t.total), packed.get(), PANEL, steps, [&](int n, Row<T> products) INLINED {
                add(products, load(sums + n * PANEL));
                store(sums + n * PANEL, products);
            });
        }
    }

    // Adds to `to` [., outputs] a block of columns of a panel matrix times the same columns of a weight [outputs, D],
    // transposed. `rows` is the number of rows of `to`.
    void add_product(T *to, const T *block_of, const T *weight, int block, int outputs, int rows) {
        const int from = block * PANEL, steps = smaller(BLOCK * PANEL, t.width - from);
        for (int q = 0; q < panels(outputs); q++) {
            T *sums = to + (long)q * rows * PANEL;
            pack_transposed(packed.get(), weight + (long)q * PANEL * t.width + from, t.width, columns(outputs, q), steps);
            product(t.count, rows_of(block_of, t.total), packed.get(), PANEL, steps, [&](int n, Row<T> products) INLINED {
                add(products, load(sums + n * PANEL));
                store(sums + n * PANEL, products);
            });
        }
    }

    void activate(int k) const {
        for (int q = 0; q < narrow; q++)
            for (int n = 0; n < t.count; n++) {
                const T *from = before(k, q) + n * PANEL;
                T *to = after(k, q) + n * PANEL;
                for (int c = 0; c < PANEL; c++)
                    to[c] = t.gelu ? from[c] * normal_probability(from[c]) : from[c] < 0 ? T(0) : from[c];
            }
    }

    static T normal_probability(T x) { return T(0.5) * (1 + std::erf(x * T(M_SQRT1_2))); }
    static T gelu_slope(T x) {
        return normal_probability(x) + x * std::exp(T(-0.5) * x * x) * T(M_2_SQRTPI * M_SQRT1_2 / 2);
    }

    // Writes the gradients of layer k's bottleneck before the activation, and of the down bias.
    void through_activation(int k) {
        for (int q = 0; q < narrow; q++) {
            Row<T> bias = {};
            const T *upstream = of_after.get() + (long)q * t.count * PANEL;
            T *to = of_before.get() + (long)q * t.count * PANEL;
            for (int n = 0; n < t.count; n++) {
                const T *before_row = before(k, q) + n * PANEL;
                for (int c = 0; c < PANEL; c++) {
                    const T above = upstream[n * PANEL + c];
                    to[n * PANEL + c] = t.gelu ? above * gelu_slope(before_row[c]) : before_row[c] <= 0 ? T(0) : above;
                }
                const Row<T> gradients = load(to + n * PANEL);
                add(bias, gradients);
            }
            put(t.of_down_bias + (long)k * t.bottleneck + q * PANEL, bias, columns(t.bottleneck, q));
        }
    }

    // Returns the product of the projection and the last up-projection, transposed, in panels [ceil(d / 16)][R][16].
    std::unique_ptr<T[]> composite() {
        const int r = t.bottleneck;
        std::unique_ptr<T[]> weight(new T[(size_t)out * r * PANEL]);
        for (int q = 0; q < out; q++) {
            pack_transposed(
                packed.get(), t.projection + (long)q * PANEL * t.width, t.width, columns(t.embedding, q), t.width);
            product(r, Operand<T>{last_up_weight(0), 1, r}, packed.get(), PANEL, t.width,
                    [&](int row, const Row<T> &products) INLINED { store(weight.get() + ((long)q * r + row) * PANEL, products); });
        }
        return weight;
    }

    // Writes the projected outputs; `embedding`, a panel matrix [count, d], holds the projection of the last input.
    void project(T *embedding) {
        const std::unique_ptr<T[]> weight = composite();
        for (int q = 0; q < out; q++) {
            const int here = columns(t.embedding, q);
            Row<T> bias = {};
            for (int c = 0; c < here; c++)
                bias.part[c / LANES<T>][c % LANES<T>] =
                    dot(t.projection + ((long)q * PANEL + c) * t.width, last_up_bias(), t.width);
            product(t.count, rows_of(after(last), t.total), weight.get() + (long)q * t.bottleneck * PANEL, PANEL,
                    t.bottleneck, [&](int n, Row<T> products) INLINED {
                        const Row<T> of_input = load(embedding + ((long)q * t.count + n) * PANEL);
                        for (int p = 0; p < PARTS<T>; p++) products.part[p] += of_input.part[p] + bias.part[p];
                        put(t.projected + (long)(t.start + n) * t.embedding + q * PANEL, products, here);
                    });
        }
    }

    // Writes the gradients of the projection, the last up-projection and its bias, the last bottleneck, and the last
    // layer's input.
    void project_backward() {
        const int r = t.bottleneck, d = t.embedding;
        std::unique_ptr<T[]> upstream(new T[(size_t)out * t.count * PANEL]), total(new T[(size_t)out * PANEL]());
        for (int q = 0; q < out; q++)
            for (int n = 0; n < t.count; n++) {
                const Row<T> gradients = get(t.upstream + (long)(t.start + n) * d + q * PANEL, columns(d, q));
                store(upstream.get() + ((long)q * t.count + n) * PANEL, gradients);
                Row<T> sums = load(total.get() + q * PANEL);
                add(sums, gradients);
                store(total.get() + q * PANEL, sums);
            }
        // inner [d, R]: upstream, transposed, times the last bottlenecks.
        const long stride = (long)narrow * PANEL;
        std::unique_ptr<T[]> inner(new T[(size_t)out * PANEL * stride]);
        for (int o = 0; o < out; o++)
            for (int q = 0; q < narrow; q++)
                product_of_columns(
                    PANEL, columns_of(upstream.get() + (long)o * t.count * PANEL), after(last, q), PANEL, t.count,
                    [&](int row, const Row<T> &products) INLINED {
                        store(inner.get() + (o * PANEL + row) * stride + q * PANEL, products);
                    });
        const std::unique_ptr<T[]> weight = composite();
        for (int q = 0; q < narrow; q++) {
            for (int o = 0; o < d; o++)
                for (int c = 0; c < PANEL; c++) {
                    const int row = q * PANEL + c;
                    packed[o * PANEL + c] = row < r ? weight[((long)(o / PANEL) * r + row) * PANEL + o % PANEL] : T(0);
                }
            product(t.count, rows_of(upstream.get(), t.count), packed.get(), PANEL, d,
                    [&](int n, const Row<T> &products) INLINED {
                        store(of_after.get() + ((long)q * t.count + n) * PANEL, products);
                    });
        }
        for (int j = 0; j < wide; j++) project_backward(j, upstream.get(), total.get(), inner.get(), stride);
    }

    // The part of `project_backward` for panel j of the state's columns.
    void project_backward(int j, const T *upstream, const T *total, const T *inner, long stride) {
        const int r = t.bottleneck, d = t.embedding, here = columns(t.width, j), from = j * PANEL;
        T *to = state_gradient(j);
        pack(packed.get(), t.projection + from, t.width, here, d);
        product(t.count, rows_of(upstream, t.count), packed.get(), PANEL, d,
                [&](int n, const Row<T> &products) INLINED { store(to + n * PANEL, products); });
        Row<T> of_bias = {};
        for (int o = 0; o < d; o++)
            for (int p = 0; p < PARTS<T>; p++) of_bias.part[p] += total[o] * load(packed.get() + o * PANEL).part[p];
        put(t.of_up_bias + last * (long)t.width + from, of_bias, here);
        for (int q = 0; q < narrow; q++)
            product_of_columns(here, columns_of(packed.get()), inner + q * PANEL, stride, d,
                               [&](int row, const Row<T> &products) INLINED {
                                   put(t.of_up_weight + (last * (long)t.width + from + row) * r + q * PANEL, products,
                                       columns(r, q));
                               });
        weight_gradient(t.of_projection, upstream, d, input(last, j), j);
        const Row<T> bias = get(last_up_bias() + from, here);
        pack_transposed(packed.get(), last_up_weight(from), r, here, r);
        product(d, Operand<T>{inner, stride, 1}, packed.get(), PANEL, r, [&](int o, Row<T> products) INLINED {
            T *of_row = t.of_projection + (long)o * t.width + from;
            const Row<T> before = get(of_row, here);
            for (int p = 0; p < PARTS<T>; p++) products.part[p] += before.part[p] + total[o] * bias.part[p];
            put(of_row, products, here);
        });
    }

    // Writes panel j of the columns of of_weight [outputs, D]: left [count, outputs], a panel matrix, transposed, times the
    // panel `right`.
    void weight_gradient(T *of_weight, const T *left, int outputs, const T *right, int j) {
        for (int q = 0; q < panels(outputs); q++)
            product_of_columns(
                columns(outputs, q), columns_of(left + (long)q * t.count * PANEL), right, PANEL, t.count,
                [&](int row, const Row<T> &products) INLINED {
                    put(of_weight + ((long)q * PANEL + row) * t.width + j * PANEL, products, columns(t.width, j));
                });
    }

    // Uses a block of the state's gradient: writes the gradients of layer k's up-projection and bias, and adds to that of
    // its bottleneck.
    void through_up(int k, int block) {
        const int r = t.bottleneck, from = block * PANEL, steps = smaller(BLOCK * PANEL, t.width - from);
        const T *weight = t.up_weight + ((long)k * t.width + from) * r;
        for (int q = 0; q < narrow; q++) {
            const int here = columns(r, q);
            T *sums = of_after.get() + (long)q * t.count * PANEL;
            if (here < PANEL) pack(packed.get(), weight + q * PANEL, r, here, steps);
            product(t.count, rows_of(state_gradient(block), t.count), here < PANEL ? packed.get() : weight + q * PANEL,
                    here < PANEL ? PANEL : r, steps, [&](int n, Row<T> products) INLINED {
                        add(products, load(sums + n * PANEL));
                        store(sums + n * PANEL, products);
                    });
        }
        for (int j = block; j < smaller(wide, block + BLOCK); j++) {
            const T *panel_gradient = state_gradient(j);
            put(t.of_up_bias + (long)k * t.width + j * PANEL, column_sums(panel_gradient, t.count), columns(t.width, j));
            for (int q = 0; q < narrow; q++)
                product_of_columns(columns(t.width, j), columns_of(panel_gradient), after(k, q), PANEL, t.count,
                                   [&](int row, const Row<T> &products) INLINED {
                                       put(t.of_up_weight + ((long)k * t.width + j * PANEL + row) * r + q * PANEL, products,
                                           columns(r, q));
                                   });
        }
    }

    // Takes panel j of the state's gradient back through layer k's down-projection and mix; writes the gradient of the
    // down-projection; returns the panel's part of the gradient of the gate's logit.
    double through_down(int k, int j) {
        const int r = t.bottleneck, here = columns(t.width, j);
        const T *weight = t.down_weight + (long)k * r * t.width, *x = input(k, j);
        T *panel_gradient = state_gradient(j);
        T *of_weight = t.of_down_weight + (long)k * r * t.width;
        weight_gradient(of_weight, of_before.get(), r, x, j);
        const bool gated = t.of_gate, passed_on = t.of_hidden[0] || t.of_hidden[1];
        return with_mix(k, j, [&](auto mixed) {
            if (!k && !passed_on && (!gated || t.views == 1)) {
                // Only the gate needs the gradient of the lowest input x = g h. Its logit's gradient is (1 - g) sum(gradient
                // x), of which the part through the down-projection W is the dot product of W and W's gradient.
                if (!gated) return 0.0;
                double of_input = dot(panel_gradient, x, (long)t.count * PANEL);
                for (long row = 0, at = j * PANEL; row < r; row++, at += t.width) of_input += dot(weight + at, of_weight + at, here);
                return of_input * mixes[0].carry;
            }
            pack(packed.get(), weight + j * PANEL, t.width, here, r);
            Row<T> gate = {};
            product(t.count, rows_of(of_before.get(), t.count), packed.get(), PANEL, r,
                    [&, panel_gradient, x](int n, Row<T> gradients) INLINED {
                        add(gradients, load(panel_gradient + n * PANEL));
                        if (gated) {
                            const Row<T> slope = mixed.gate_slope(x + n * PANEL, n);
                            for (int p = 0; p < PARTS<T>; p++) gate.part[p] += gradients.part[p] * slope.part[p];
                        }
                        if (passed_on) add_to_views(gradients, n, k, j);
                        for (int p = 0; p < PARTS<T>; p++) gradients.part[p] *= mixed.carry;
                        store(panel_gradient + n * PANEL, gradients);
                    });
            return (double)sum(gate) * mixed.gate_scale();
        });
    }

    void add_to_views(const Row<T> &gradients, int n, int k, int j) const {
        if (t.of_hidden[0]) add_to(t.of_hidden[0], gradients, mixes[k].first, n, k, j);
        if (t.views == 2 && t.of_hidden[1]) add_to(t.of_hidden[1], gradients, mixes[k].second, n, k, j);
    }

    void add_to(T *of_view, const Row<T> &gradients, T weight, int n, int k, int j) const {
        T *to = of_view + ((long)(t.start + n) * t.layers + k) * t.width + j * PANEL;
        for (int c = 0; c < columns(t.width, j); c++) to[c] += weight * gradients.part[c / LANES<T>][c % LANES<T>];
    }
};

}  // namespace

EXPORT_SIZE(Tower, Tower<SCALAR>)

extern "C" {
int32_t side_forward(const Tower<SCALAR> *tower) {
    return guarded(fits(*tower), [&] { Pass<SCALAR>(*tower).forward(); });
}
int32_t side_encode(const Tower<SCALAR> *tower) {
    return guarded(fits(*tower) && can_encode(*tower), [&] { Pass<SCALAR>(*tower).encode(); });
}
int32_t side_backward(const Tower<SCALAR> *tower) {
    return guarded(fits(*tower) && (!tower->count || tower->upstream), [&] { Pass<SCALAR>(*tower).backward(); });
}
}
