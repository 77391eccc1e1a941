// A batch's loss, and the record of the losses of all steps since the trainer last read and cleared it.
#include <cmath>

#include "entry.h"

namespace {

template <class T> struct Record {
    int32_t rows;
    int64_t step;               // number of the step in the run, from 0
    const T *row_losses;        // [R]
    const double *row_weights;  // [R]: weight of the row's loss in the batch's; 0 for padding
    T *loss;                    // the batch's loss
    double *sums;               // [4]: sum of row losses; number of rows; 1 + the first failed step, or 0; the loss there
    float *steps;               // number of steps that Adam has taken
    T *share;  // [2], of a rank: its part of the loss, and its rows; null: the rows are the whole batch
};

// Writes the loss and adds it to the sums. After a loss that is not finite, only the loss is written. With `share`, the
// loss and the rows are written there, to be added up over the ranks, and nothing else is.
template <class T> void record(const Record<T> &r) {
    double sum = 0;
    int64_t rows = 0;
    for (int row = 0; row < r.rows; row++) {
        sum += r.row_losses[row] * r.row_weights[row];
        rows += r.row_weights[row] > 0;
    }
    const T loss = sum;
    if (r.share) {
        r.share[0] = loss;
        r.share[1] = rows;
        return;
    }
    *r.loss = loss;
    if (r.sums[2] != 0) return;
    if (std::isfinite(loss)) {
        r.sums[0] += (double)loss * rows;
        r.sums[1] += rows;
        *r.steps += 1;
    } else {
        r.sums[2] = r.step + 1;
        r.sums[3] = loss;
    }
}

}  // namespace

EXPORT_SIZE(Record, Record<SCALAR>)

extern "C" int32_t record_loss(const Record<SCALAR> *loss) {
    return guarded(loss->rows > 0 && loss->step >= 0, [&] { record(*loss); });
}
