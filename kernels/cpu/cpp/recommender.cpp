// What joins the parts of a recommender's loss: item vectors out of the towers' outputs, the rows' own out of those, the
// batch's loss out of the rows' losses; and the way back. `Recommender.loss` is the specification. Little work, by one
// thread each.
#include <cmath>

#include "entry.h"

namespace {

template <class T> struct Joint {
    int32_t items, rows, width, towers, room;  // V, R, d; room: items that each tower's output has memory for
    const int64_t *distinct, *multiplicity;    // [V]
    const int64_t *inputs;                     // [R]
    const double *row_weights;                 // [R]
    const double *log_popularity;              // [items of the catalogue + 1]
    const T *projected, *biases;               // [towers][room][d], [towers][d]
    T *log_multiplicity, *column;              // [V]: log m, and log m - log p
    T *vectors, *x;                            // [V, d], [R, d]
    const T *row_losses;                       // [R]
    const T *bias;                             // [d]
    T *loss;                                   // of the batch
    T *of_row_losses;                          // [R]
    const T *of_x;                             // [R, d]
    T *of_vectors;                             // [V, d]: first what the loss alone gives, then all
    T *of_bias;                                // [d]
};

template <class T> void constants(const Joint<T> &j) {
    for (int row = 0; row < j.rows; row++) j.of_row_losses[row] = j.row_weights[row];
    for (int v = 0; v < j.items; v++) {
        j.log_multiplicity[v] = std::log(T(j.multiplicity[v]));
        j.column[v] = j.log_multiplicity[v] - T(j.log_popularity[j.distinct[v]]);
    }
}

template <class T> void vectors(const Joint<T> &j) {
    const long d = j.width;
    for (long v = 0; v < j.items; v++) {
        T *to = j.vectors + v * d;
        for (long c = 0; c < d; c++) to[c] = j.bias[c];
        for (int t = 0; t < j.towers; t++)
            for (long c = 0; c < d; c++) to[c] += j.projected[(t * (long)j.room + v) * d + c] + j.biases[t * d + c];
    }
    for (long row = 0; row < j.rows; row++)
        for (long c = 0; c < d; c++) j.x[row * d + c] = j.vectors[j.inputs[row] * d + c];
}

template <class T> void loss(const Joint<T> &j) {
    double sum = 0;
    for (int row = 0; row < j.rows; row++) sum += j.row_losses[row] * j.row_weights[row];
    *j.loss = sum;
}

template <class T> void backward(const Joint<T> &j) {
    const long d = j.width;
    for (long row = 0; row < j.rows; row++)
        for (long c = 0; c < d; c++) j.of_vectors[j.inputs[row] * d + c] += j.of_x[row * d + c];
    for (long c = 0; c < d; c++) j.of_bias[c] = 0;
    for (long v = 0; v < j.items; v++)
        for (long c = 0; c < d; c++) j.of_bias[c] += j.of_vectors[v * d + c];
}

template <class T> bool fits(const Joint<T> &j) {
    return j.items > 0 && j.rows > 0 && j.width > 0 && j.towers > 0 && j.room >= j.items;
}

}  // namespace

EXPORT_SIZE(Joint, Joint<SCALAR>)

extern "C" {
int32_t joint_constants(const Joint<SCALAR> *joint) {
    return guarded(fits(*joint), [&] { constants(*joint); });
}
int32_t joint_vectors(const Joint<SCALAR> *joint) {
    return guarded(fits(*joint), [&] { vectors(*joint); });
}
int32_t joint_loss(const Joint<SCALAR> *joint) {
    return guarded(fits(*joint), [&] { loss(*joint); });
}
int32_t joint_backward(const Joint<SCALAR> *joint) {
    return guarded(fits(*joint), [&] { backward(*joint); });
}
}
