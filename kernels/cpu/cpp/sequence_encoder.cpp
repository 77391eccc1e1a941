// SASRec over the packed rows of some users, forward and backward. `kernels/reference/sequence_encoder.py` is its
// specification.
#include <cmath>

#include "matrices.h"

namespace {

// The weights of a block, or their gradients, in the order of `EncoderBlock` in types.py.
template <class T> struct Block {
    T *query, *key, *value, *output;              // [d, d]
    T *attention_scale, *attention_shift;         // [d]
    T *feed_in, *feed_in_bias;                    // [f, d], [f]
    T *feed_out, *feed_out_bias;                  // [d, f], [d]
    T *feed_scale, *feed_shift;                   // [d]
};

// The arguments of a call; matrices are row-major. R is the number of rows of this call.
template <class T> struct Encoder {
    int32_t rows, width, hidden, heads, blocks, length, positions, drops;  // R, d, f; drops: 1 with dropout
    int64_t user_count, memory_size;  // users of the grid; numbers that `memory` holds
    const int64_t *slots;    // [R] ascending: user * length + position
    const int64_t *users;    // [user_count]: user numbers, which enter dropout's hash
    uint32_t prefix, threshold;
    double keep_scale, epsilon;
    const T *x;              // [R, d]
    const T *position, *scale, *shift;  // [positions, d], [d]
    const Block<T> *weights;
    T *states;               // [R, d]
    T *memory;               // room for `sequence_memory` numbers; the backward reads what the forward left there
    const T *upstream;       // [R, d]
    T *of_x, *of_position, *of_scale, *of_shift;
    const Block<T> *of_weights;
};

constexpr int SITES_PER_BLOCK = 3;
constexpr int MOST_BLOCKS = 64;  // as in sequence_encoder.py

inline uint32_t mixed(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    return h ^ (h >> 16);
}
inline uint32_t absorbed(uint32_t h, uint32_t field) { return mixed(h ^ field * 0x9E3779B1u); }

// A layer norm's normalised rows [R, d], and 1 / standard deviation of each row [R].
template <class T> struct Norm {
    T *normalised, *inverse;
};

// The results of a block's forward that the backward reads; *_drops are dropout factors.
template <class T> struct KeptBlock {
    T *projections;             // [R, 3 d]: queries, keys, values
    T *weights, *weight_drops;  // attention weights: for each row and head, one for each row of its user up to itself
    T *attended, *attended_drops;
    Norm<T> attention_norm;
    T *middle;                  // [R, d], after attention
    T *fed;                     // [R, f], after the ReLU
    T *fed_drops;
    Norm<T> feed_norm;
    T *out;                     // [R, d]
};

template <class T> class Sequences {
  public:
    explicit Sequences(const Encoder<T> &encoder) : e(encoder), d(e.width), pairs(0), longest(0) {
        for (int row = 0, first = 0; row < e.rows; row++) {
            if (e.slots[row] / e.length != e.slots[first] / e.length) first = row;
            const long seen = row - first + 1;
            pairs += seen;
            longest = seen > longest ? seen : longest;
        }
    }

    // Returns how many numbers of memory forward and backward need.
    int64_t memory() {
        T none;
        return place(&none);
    }

    void forward() {
        place(e.memory);
        for (int row = 0; row < e.rows; row++) {
            const T *position = e.position + at(row) * d;
            for (int c = 0; c < d; c++) work[(long)row * d + c] = e.x[(long)row * d + c] + position[c];
        }
        draw(input_drops, 0);
        normalise(work, first_norm, e.scale, e.shift, placed);
        scaled(placed, placed, input_drops);
        const T *x = placed;
        for (int b = 0; b < e.blocks; b++) {
            const Block<T> &w = e.weights[b];
            KeptBlock<T> &k = kept[b];
            const int site = 1 + SITES_PER_BLOCK * b;
            draw(k.attended_drops, site + 1);
            draw(k.fed_drops, site + 2);
            linear(e.rows, x, d, w.query, (T *)nullptr, d, k.projections, 3 * d, packed);
            linear(e.rows, x, d, w.key, (T *)nullptr, d, k.projections + d, 3 * d, packed);
            linear(e.rows, x, d, w.value, (T *)nullptr, d, k.projections + 2 * d, 3 * d, packed);
            attend(k, site);
            linear(e.rows, k.attended, d, w.output, (T *)nullptr, d, work, d, packed);
            joined(x, work, k.attended_drops);
            normalise(work, k.attention_norm, w.attention_scale, w.attention_shift, k.middle);
            linear(e.rows, k.middle, d, w.feed_in, w.feed_in_bias, e.hidden, k.fed, e.hidden, packed);
            for (long i = 0; i < (long)e.rows * e.hidden; i++) k.fed[i] = k.fed[i] < 0 ? T(0) : k.fed[i];
            linear(e.rows, k.fed, e.hidden, w.feed_out, w.feed_out_bias, d, work, d, packed);
            joined(k.middle, work, k.fed_drops);
            normalise(work, k.feed_norm, w.feed_scale, w.feed_shift, b + 1 < e.blocks ? k.out : e.states);
            x = k.out;
        }
    }

    void backward() {
        place(e.memory);
        const long size = (long)e.rows * d;
        T *gradient = work;
        copy(gradient, e.upstream, size);
        for (int b = e.blocks - 1; b >= 0; b--) {
            const Block<T> &w = e.weights[b], &of = e.of_weights[b];
            const KeptBlock<T> &k = kept[b];
            const T *x = b ? kept[b - 1].out : placed;
            normalise_backward(gradient, k.feed_norm, w.feed_scale, of.feed_scale, of.feed_shift);
            scaled(branch, gradient, k.fed_drops);
            clear(of_fed, (long)e.rows * e.hidden);
            linear_backward(e.rows, k.fed, e.hidden, w.feed_out, d, branch, d, of_fed, of.feed_out, of.feed_out_bias);
            for (long i = 0; i < (long)e.rows * e.hidden; i++) of_fed[i] = k.fed[i] <= 0 ? T(0) : of_fed[i];
            linear_backward(e.rows, k.middle, d, w.feed_in, e.hidden, of_fed, e.hidden, gradient, of.feed_in, of.feed_in_bias);
            normalise_backward(gradient, k.attention_norm, w.attention_scale, of.attention_scale, of.attention_shift);
            scaled(branch, gradient, k.attended_drops);
            T *of_attended = of_fed;
            clear(of_attended, size);
            linear_backward(e.rows, k.attended, d, w.output, d, branch, d, of_attended, of.output, (T *)nullptr);
            attend_backward(k, of_attended);
            linear_backward(e.rows, x, d, w.query, d, of_projections, 3 * d, gradient, of.query, (T *)nullptr);
            linear_backward(e.rows, x, d, w.key, d, of_projections + d, 3 * d, gradient, of.key, (T *)nullptr);
            linear_backward(e.rows, x, d, w.value, d, of_projections + 2 * d, 3 * d, gradient, of.value, (T *)nullptr);
        }
        scaled(gradient, gradient, input_drops);
        normalise_backward(gradient, first_norm, e.scale, e.of_scale, e.of_shift);
        copy(e.of_x, gradient, size);
        clear(e.of_position, e.positions * d);
        for (int row = 0; row < e.rows; row++)
            for (int c = 0; c < d; c++) e.of_position[at(row) * d + c] += gradient[(long)row * d + c];
    }

  private:
    const Encoder<T> &e;
    const long d;
    long pairs;    // number of pairs of a row and a row that it attends to
    long longest;  // rows of the longest history
    KeptBlock<T> kept[MOST_BLOCKS];
    Norm<T> first_norm;
    T *placed, *input_drops, *work, *branch, *of_fed, *of_projections, *of_weights, *packed;

    // Sets the matrices' addresses, one after the other from `memory` on; returns how many numbers they take.
    int64_t place(T *memory) {
        int64_t taken = 0;
        auto take = [&](long count) {
            T *start = (T *)((uintptr_t)memory + sizeof(T) * taken);
            taken += (count + PANEL - 1) / PANEL * PANEL;
            return start;
        };
        const long rows = e.rows;
        first_norm = {take(rows * d), take(rows)};
        placed = take(rows * d);
        input_drops = e.drops ? take(rows * d) : nullptr;
        for (int b = 0; b < e.blocks; b++) {
            KeptBlock<T> &k = kept[b];
            k.projections = take(3 * rows * d);
            k.weights = take(pairs * e.heads);
            k.weight_drops = e.drops ? take(pairs * e.heads) : nullptr;
            k.attended = take(rows * d);
            k.attended_drops = e.drops ? take(rows * d) : nullptr;
            k.attention_norm = {take(rows * d), take(rows)};
            k.middle = take(rows * d);
            k.fed = take(rows * e.hidden);
            k.fed_drops = e.drops ? take(rows * d) : nullptr;
            k.feed_norm = {take(rows * d), take(rows)};
            k.out = b + 1 < e.blocks ? take(rows * d) : nullptr;
        }
        work = take(rows * d);
        branch = take(rows * d);
        of_fed = take(rows * (e.hidden > d ? e.hidden : d));
        of_projections = take(3 * rows * d);
        of_weights = take(longest);
        packed = take((long)PANEL * (e.hidden > d ? e.hidden : d));
        return taken;
    }

    // Returns a row's index into the model's positions; the last item of a history has the last position.
    long at(int row) const { return e.slots[row] % e.length + e.positions - e.length; }

    uint32_t row_hash(uint32_t site, int row) const {
        return absorbed(absorbed(absorbed(e.prefix, site), (uint32_t)e.users[e.slots[row] / e.length]), (uint32_t)at(row));
    }

    void draw(T *factors, uint32_t site) const {
        if (!factors) return;
        for (int row = 0; row < e.rows; row++) {
            const uint32_t hash = row_hash(site, row);
            for (uint32_t c = 0; c < (uint32_t)d; c++)
                factors[row * d + c] = absorbed(hash, c) >= e.threshold ? T(e.keep_scale) : T(0);
        }
    }

    void scaled(T *to, const T *from, const T *factors) const {
        const long size = (long)e.rows * d;
        if (factors)
            for (long i = 0; i < size; i++) to[i] = from[i] * factors[i];
        else if (to != from) copy(to, from, size);
    }

    // Computes branch = x + branch * factors, without factors if null.
    void joined(const T *x, T *branch, const T *factors) const {
        for (long i = 0; i < (long)e.rows * d; i++) branch[i] = x[i] + (factors ? branch[i] * factors[i] : branch[i]);
    }

    void normalise(const T *x, const Norm<T> &norm, const T *scale, const T *shift, T *to) const {
        for (int row = 0; row < e.rows; row++, x += d, to += d) {
            T *normalised = norm.normalised + row * d;
            const T mean = sum(x, d) / d;
            for (int c = 0; c < d; c++) normalised[c] = x[c] - mean;
            const T inverse = 1 / std::sqrt(dot(normalised, normalised, d) / d + T(e.epsilon));
            norm.inverse[row] = inverse;
            for (int c = 0; c < d; c++) {
                normalised[c] *= inverse;
                to[c] = normalised[c] * scale[c] + shift[c];
            }
        }
    }

    // Replaces the gradient of a norm's output by that of its input; writes those of scale and shift.
    void normalise_backward(T *gradient, const Norm<T> &norm, const T *scale, T *of_scale, T *of_shift) const {
        clear(of_scale, d);
        clear(of_shift, d);
        for (int row = 0; row < e.rows; row++, gradient += d) {
            const T *normalised = norm.normalised + row * d;
            for (int c = 0; c < d; c++) {
                of_scale[c] += gradient[c] * normalised[c];
                of_shift[c] += gradient[c];
                gradient[c] *= scale[c];
            }
            const T mean = sum(gradient, d) / d, slope = dot(gradient, normalised, d) / d;
            for (int c = 0; c < d; c++) gradient[c] = norm.inverse[row] * (gradient[c] - mean - normalised[c] * slope);
        }
    }

    // Calls f(row, first row of its user, offset of its attention weights) for each row.
    template <class F> void each_row(F f) const {
        long begin = 0;
        for (int row = 0, first = 0; row < e.rows; row++) {
            if (e.slots[row] / e.length != e.slots[first] / e.length) first = row;
            f(row, first, begin);
            begin += (long)(row - first + 1) * e.heads;
        }
    }

    void attend(KeptBlock<T> &k, int site) const {
        const long wide = 3 * d, part = d / e.heads;
        const T root = 1 / std::sqrt(T(part));
        each_row([&](int row, int first, long begin) {
            const int seen = row - first + 1;
            const uint32_t hash = e.drops ? row_hash(site, row) : 0;
            T *to = k.attended + row * d;
            clear(to, d);
            for (int head = 0; head < e.heads; head++) {
                T *weights = k.weights + begin + (long)head * seen;
                const T *query = k.projections + row * wide + head * part;
                T most = -INFINITY, total = 0;
                for (int i = 0; i < seen; i++) {
                    weights[i] = root * dot(query, k.projections + (first + i) * wide + d + head * part, part);
                    most = weights[i] > most ? weights[i] : most;
                }
                for (int i = 0; i < seen; i++) total += weights[i] = std::exp(weights[i] - most);
                for (int i = 0; i < seen; i++) {
                    weights[i] /= total;
                    T factor = 1;
                    if (e.drops) {
                        const uint32_t channel = head * e.positions + at(first + i);
                        factor = absorbed(hash, channel) >= e.threshold ? T(e.keep_scale) : T(0);
                        k.weight_drops[begin + (long)head * seen + i] = factor;
                    }
                    const T *value = k.projections + (first + i) * wide + 2 * d + head * part;
                    const T dropped = weights[i] * factor;
                    for (int c = 0; c < part; c++) to[head * part + c] += dropped * value[c];
                }
            }
        });
    }

    void attend_backward(const KeptBlock<T> &k, const T *of_attended) const {
        const long wide = 3 * d, part = d / e.heads;
        const T root = 1 / std::sqrt(T(part));
        clear(of_projections, e.rows * wide);
        each_row([&](int row, int first, long begin) {
            const int seen = row - first + 1;
            for (int head = 0; head < e.heads; head++) {
                const long offset = begin + (long)head * seen;
                const T *weights = k.weights + offset, *above = of_attended + row * d + head * part;
                const T *query = k.projections + row * wide + head * part;
                T *of_query = of_projections + row * wide + head * part;
                T common = 0;
                for (int i = 0; i < seen; i++) {
                    const T factor = e.drops ? k.weight_drops[offset + i] : T(1);
                    const T *value = k.projections + (first + i) * wide + 2 * d + head * part;
                    T *of_value = of_projections + (first + i) * wide + 2 * d + head * part;
                    const T dropped = weights[i] * factor;
                    for (int c = 0; c < part; c++) of_value[c] += dropped * above[c];
                    of_weights[i] = dot(above, value, part) * factor;
                    common += weights[i] * of_weights[i];
                }
                for (int i = 0; i < seen; i++) {
                    const T of_score = weights[i] * (of_weights[i] - common) * root;
                    const T *key = k.projections + (first + i) * wide + d + head * part;
                    T *of_key = of_projections + (first + i) * wide + d + head * part;
                    for (int c = 0; c < part; c++) {
                        of_query[c] += of_score * key[c];
                        of_key[c] += of_score * query[c];
                    }
                }
            }
        });
    }
};

// True if the sizes fit together and the slots are ascending and within the grid.
template <class T> bool fits(const Encoder<T> &e) {
    if (!are_panels(e.width) || !are_panels(e.hidden) || e.rows < 0 || e.heads < 1 || e.width % e.heads) return false;
    if (e.blocks < 1 || e.blocks > MOST_BLOCKS || e.length < 1 || e.length > e.positions) return false;
    if (e.user_count < 0 || (e.drops && e.rows && !e.users)) return false;
    int64_t least = 0;
    for (int row = 0; row < e.rows; row++) {
        if (e.slots[row] < least) return false;
        least = e.slots[row];
    }
    return !e.rows || least < e.user_count * e.length;
}

template <class T> bool fits_memory(const Encoder<T> &e) {
    return fits(e) && Sequences<T>(e).memory() <= e.memory_size;
}

}  // namespace

EXPORT_SIZE(EncoderBlock, Block<SCALAR>)
EXPORT_SIZE(Encoder, Encoder<SCALAR>)

extern "C" {
// Returns how many numbers `memory` has to hold, or -1 if the sizes do not fit.
int64_t sequence_memory(const Encoder<SCALAR> *encoder) {
    return fits(*encoder) ? Sequences<SCALAR>(*encoder).memory() : -1;
}
int32_t sequence_forward(const Encoder<SCALAR> *encoder) {
    return guarded(fits_memory(*encoder), [&] { Sequences<SCALAR>(*encoder).forward(); });
}
int32_t sequence_backward(const Encoder<SCALAR> *encoder) {
    return guarded(fits_memory(*encoder) && (!encoder->rows || encoder->upstream),
                   [&] { Sequences<SCALAR>(*encoder).backward(); });
}
}
