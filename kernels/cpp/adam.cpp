// Adam's update of many parameters in one pass over what it reads and writes (Kingma and Ba 2015, algorithm 1).
//
// The numbers of all parameters stand in one row, of which each call takes a range.
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

template <class T> struct Parameter {
    T *values;
    const T *gradient;
    T *mean, *square;  // the moments
    float *steps;      // taken before this one
    int64_t count;
    double rate;
};

template <class T> struct Adam {
    const Parameter<T> *parameters;
    int64_t count, start, length;
    double beta1, beta2, epsilon;
};

template <class T> void update(const Adam<T> &adam, const Parameter<T> &parameter, int64_t from, int64_t to) {
    const double steps = *parameter.steps + 1.0;
    const T kept = adam.beta2, fresh = 1 - adam.beta2, share = 1 - adam.beta1, epsilon = adam.epsilon;
    const T rate = parameter.rate / (1 - std::pow(adam.beta1, steps));
    const T scale = 1 / std::sqrt(1 - std::pow(adam.beta2, steps));
    T *__restrict values = parameter.values, *__restrict mean = parameter.mean, *__restrict square = parameter.square;
    const T *__restrict gradient = parameter.gradient;
    for (int64_t i = from; i < to; i++) {
        mean[i] += share * (gradient[i] - mean[i]);
        square[i] = kept * square[i] + fresh * gradient[i] * gradient[i];
        values[i] -= rate * mean[i] / (std::sqrt(square[i]) * scale + epsilon);
    }
}

}  // namespace

extern "C" {
int32_t adam_update(const Adam<SCALAR> *adam) {
    int64_t begin = 0;
    for (int64_t i = 0; i < adam->count; i++) {
        const Parameter<SCALAR> &own = adam->parameters[i];
        const int64_t from = std::max<int64_t>(adam->start - begin, 0);
        const int64_t to = std::min(adam->start + adam->length - begin, own.count);
        if (from < to) update(*adam, own, from, to);
        begin += own.count;
    }
    return 0;
}

// When every range has been updated.
void adam_advance(const Adam<SCALAR> *adam) {
    for (int64_t i = 0; i < adam->count; i++) *adam->parameters[i].steps += 1;
}
}
