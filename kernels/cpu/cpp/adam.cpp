// Adam's update of many parameters, which reads and writes each number once (Kingma and Ba 2015, algorithm 1), with
// decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).
//
// The numbers of all parameters are counted through, and each call updates a range of them. `Adam` has a tensor for each
// parameter; `FlatAdam` has one buffer, divided into lines. `FlatAdam` may also clip the gradient by its norm, and keep a
// moving average of the parameters.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "entry.h"

namespace {

template <class T> struct Parameter {
    T *values;
    T *mean, *square;  // the moments
    float *steps;      // number of steps before this one
    int64_t count, mean_count, square_count;
};

template <class T> struct Adam {
    const Parameter<T> *parameters;
    const T *const *gradients;
    const double *rates, *decays;  // [count]: learning rates and weight decays
    const int64_t *gradient_counts;
    int64_t count, start, length;
    double beta1, beta2, epsilon;
};

template <class T> struct FlatAdam {
    T *values;
    const T *gradient;
    T *mean, *square;
    const uint8_t *groups;         // [lines]: the group of each line
    const double *rates, *decays;  // [group_count]: learning rates and weight decays
    const float *steps;            // number of steps, this one included
    const double *record;          // [4]: nothing is updated if record[2] is not 0
    int64_t lines, start, length;  // all lines; first line and number of lines of this call
    int32_t group_count;
    double beta1, beta2, epsilon;
    const double *square_sums;  // [sum_count]: sums of the gradient's squares; not read if clip_norm is 0
    int64_t sum_count;
    double clip_norm;      // largest norm of the gradient; 0 for any
    T *average;            // [lines * LINE], or null for no average
    double average_share;  // least share of a new parameter in the average
};

template <class T> struct SquareSums {
    const T *gradient;
    double *sums;                  // [blocks]: of each BLOCK numbers
    int64_t count, start, length;  // all numbers; first block and number of blocks of this call
};

constexpr int64_t BLOCK = 8192;  // numbers in a block of SquareSums, as in adam.py
constexpr int LANES = 8;         // sums that a block is added up in, so that the compiler can use vectors

constexpr int64_t LINE = 32;  // numbers in a line, as FLAT_LINE in types.py

// The factors of an update.
template <class T> struct Rule {
    T kept, fresh, share, epsilon, rate, scale, shrink, clip;

    Rule(double beta1, double beta2, double epsilon, double rate, double decay, double steps, double clip = 1)
        : kept(beta2), fresh(1 - beta2), share(1 - beta1), epsilon(epsilon), rate(rate / (1 - std::pow(beta1, steps))),
          scale(1 / std::sqrt(1 - std::pow(beta2, steps))), shrink(rate * decay), clip(clip) {}
};

template <class T>
void update(const Rule<T> &rule, T *__restrict values, const T *__restrict gradient, T *__restrict mean,
            T *__restrict square, int64_t count) {
    const T kept = rule.kept, fresh = rule.fresh, share = rule.share, epsilon = rule.epsilon;
    const T rate = rule.rate, scale = rule.scale, shrink = rule.shrink, clip = rule.clip;
    for (int64_t n = 0; n < count; n++) {
        const T slope = clip * gradient[n];
        mean[n] += share * (slope - mean[n]);
        square[n] = kept * square[n] + fresh * slope * slope;
        values[n] -= shrink * values[n] + rate * mean[n] / (std::sqrt(square[n]) * scale + epsilon);
    }
}

// Updates the numbers `from` to `to` - 1 of parameter i.
template <class T> void update(const Adam<T> &adam, int64_t i, int64_t from, int64_t to) {
    const Parameter<T> &parameter = adam.parameters[i];
    const Rule<T> rule(adam.beta1, adam.beta2, adam.epsilon, adam.rates[i], adam.decays[i],
                       *parameter.steps + 1.0);
    update(rule, parameter.values + from, adam.gradients[i] + from, parameter.mean + from, parameter.square + from, to - from);
}

// True if moments and gradients are as long as their parameter and the range lies within all numbers.
template <class T> bool fits(const Adam<T> &adam) {
    if (adam.count < 0) return false;
    int64_t total = 0;
    for (int64_t i = 0; i < adam.count; i++) {
        const Parameter<T> &p = adam.parameters[i];
        const bool alike = p.mean_count == p.count && p.square_count == p.count && adam.gradient_counts[i] == p.count;
        if (p.count < 0 || !alike || !p.steps) return false;
        total += p.count;
    }
    return is_part(adam.start, adam.length, total);
}

template <class T> void update_range(const Adam<T> &adam) {
    int64_t begin = 0;
    for (int64_t i = 0; i < adam.count; i++) {
        const int64_t size = adam.parameters[i].count;
        const int64_t from = std::max<int64_t>(adam.start - begin, 0);
        const int64_t to = std::min(adam.start + adam.length - begin, size);
        if (from < to) update(adam, i, from, to);
        begin += size;
    }
}

// Returns the factor that brings the gradient to clip_norm, at most 1 (Pascanu et al. 2013, algorithm 1). The small number
// is that of torch.nn.utils.clip_grad_norm_. It is NaN if a gradient is.
template <class T> double clip_factor(const FlatAdam<T> &adam) {
    if (adam.clip_norm == 0) return 1;
    double sum = 0;
    for (int64_t i = 0; i < adam.sum_count; i++) sum += adam.square_sums[i];
    const double factor = adam.clip_norm / (std::sqrt(sum) + 1e-6);
    return factor >= 1 ? 1 : factor;
}

// Moves the average of a call's parameters towards their new values. The share of the new values falls from step to step,
// 9 / (10 + steps), to average_share.
template <class T> void average_lines(const FlatAdam<T> &adam) {
    const T share = std::max(adam.average_share, 9 / (10.0 + *adam.steps));
    const T *__restrict values = adam.values;
    T *__restrict average = adam.average;
    const int64_t last = (adam.start + adam.length) * LINE;
    for (int64_t n = adam.start * LINE; n < last; n++) average[n] += share * (values[n] - average[n]);
}

template <class T> void add_squares(const SquareSums<T> &call) {
    for (int64_t block = call.start; block < call.start + call.length; block++) {
        const int64_t last = std::min((block + 1) * BLOCK, call.count);
        double lanes[LANES] = {}, sum = 0;
        for (int64_t n = block * BLOCK; n < last; n += LANES)
            for (int lane = 0; lane < LANES; lane++) lanes[lane] += (double)call.gradient[n + lane] * call.gradient[n + lane];
        for (double lane : lanes) sum += lane;
        call.sums[block] = sum;
    }
}

// True if the blocks of a call lie within the numbers, which are whole lanes.
template <class T> bool fits(const SquareSums<T> &call) {
    if (call.count < 0 || call.count % LANES) return false;
    return is_part(call.start, call.length, (call.count + BLOCK - 1) / BLOCK);
}

// Updates the lines of a call; neighbouring lines of one group together.
template <class T> void update_lines(const FlatAdam<T> &adam) {
    const double clip = clip_factor(adam);
    for (int64_t line = adam.start, next; line < adam.start + adam.length; line = next) {
        const uint8_t group = adam.groups[line];
        for (next = line + 1; next < adam.start + adam.length && adam.groups[next] == group; next++) {}
        const Rule<T> rule(adam.beta1, adam.beta2, adam.epsilon, adam.rates[group], adam.decays[group], *adam.steps,
                           clip);
        const int64_t first = line * LINE;
        update(rule, adam.values + first, adam.gradient + first, adam.mean + first, adam.square + first,
               (next - line) * LINE);
    }
    if (adam.average) average_lines(adam);
}

template <class T> bool fits(const FlatAdam<T> &adam) {
    if (!is_part(adam.start, adam.length, adam.lines) || !adam.steps || adam.sum_count < 0) return false;
    for (int64_t line = adam.start; line < adam.start + adam.length; line++)
        if (adam.groups[line] >= adam.group_count) return false;
    return adam.record[2] != 0 || *adam.steps > 0;
}

}  // namespace

EXPORT_SIZE(AdamParameter, Parameter<SCALAR>)
EXPORT_SIZE(Adam, Adam<SCALAR>)
EXPORT_SIZE(FlatAdam, FlatAdam<SCALAR>)
EXPORT_SIZE(SquareSums, SquareSums<SCALAR>)

extern "C" {
int32_t adam_update(const Adam<SCALAR> *adam) {
    return guarded(fits(*adam), [&] { update_range(*adam); });
}

int32_t adam_update_lines(const FlatAdam<SCALAR> *adam) {
    return guarded(fits(*adam), [&] {
        if (adam->record[2] == 0) update_lines(*adam);
    });
}

// Adds up the squares of the gradient's numbers, block by block.
int32_t square_sums(const SquareSums<SCALAR> *call) {
    return guarded(fits(*call), [&] { add_squares(*call); });
}

// Adds 1 to the step count of each parameter; called once after all ranges have been updated.
int32_t adam_advance(const Adam<SCALAR> *adam) {
    return guarded(fits(*adam), [&] {
        for (int64_t i = 0; i < adam->count; i++) *adam->parameters[i].steps += 1;
    });
}
}
