// A batch's loss, and the record of all steps since it was read: `TrainingStep` keeps the same by PyTorch.
#include <cmath>

#include "entry.h"

namespace {

template <class T> struct Record {
    int32_t rows;
    int64_t step;               // of the run, from 0
    const T *row_losses;        // [R]
    const double *row_weights;  // [R]: the row's part in the loss; 0 for padding
    T *loss;                    // of the batch
    double *sums;               // [4]: of losses over rows, of rows; the first failed step from 1, or 0; its loss
    float *steps;               // that Adam has taken
};

// From the first loss on that is not finite, nothing counts.
template <class T> void record(const Record<T> &r) {
    double sum = 0;
    int64_t rows = 0;
    for (int row = 0; row < r.rows; row++) {
        sum += r.row_losses[row] * r.row_weights[row];
        rows += r.row_weights[row] > 0;
    }
    const T loss = sum;
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
