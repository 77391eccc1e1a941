// Adam's update of many parameters in one pass over what it reads and writes (Kingma and Ba 2015, algorithm 1).
//
// The numbers of all parameters stand in one row, of which each call takes a range.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "entry.h"

namespace {

template <class T> struct Parameter {
    T *values;
    T *mean, *square;  // the moments
    float *steps;      // taken before this one
    int64_t count, mean_count, square_count;
};

template <class T> struct Adam {
    const Parameter<T> *parameters;
    const T *const *gradients;
    const double *rates;
    const int64_t *gradient_counts;
    int64_t count, start, length;
    double beta1, beta2, epsilon;
};

// Of parameter i, its numbers `from` to `to`.
template <class T> void update(const Adam<T> &adam, int64_t i, int64_t from, int64_t to) {
    const Parameter<T> &parameter = adam.parameters[i];
    const double steps = *parameter.steps + 1.0;
    const T kept = adam.beta2, fresh = 1 - adam.beta2, share = 1 - adam.beta1, epsilon = adam.epsilon;
    const T rate = adam.rates[i] / (1 - std::pow(adam.beta1, steps));
    const T scale = 1 / std::sqrt(1 - std::pow(adam.beta2, steps));
    T *__restrict values = parameter.values, *__restrict mean = parameter.mean, *__restrict square = parameter.square;
    const T *__restrict gradient = adam.gradients[i];
    for (int64_t n = from; n < to; n++) {
        mean[n] += share * (gradient[n] - mean[n]);
        square[n] = kept * square[n] + fresh * gradient[n] * gradient[n];
        values[n] -= rate * mean[n] / (std::sqrt(square[n]) * scale + epsilon);
    }
}

// Moments and gradients are as long as their parameter, and the range lies in the row of all numbers.
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

}  // namespace

EXPORT_SIZE(AdamParameter, Parameter<SCALAR>)
EXPORT_SIZE(Adam, Adam<SCALAR>)

extern "C" {
int32_t adam_update(const Adam<SCALAR> *adam) {
    return guarded(fits(*adam), [&] { update_range(*adam); });
}

// When every range has been updated.
int32_t adam_advance(const Adam<SCALAR> *adam) {
    return guarded(fits(*adam), [&] {
        for (int64_t i = 0; i < adam->count; i++) *adam->parameters[i].steps += 1;
    });
}
}
