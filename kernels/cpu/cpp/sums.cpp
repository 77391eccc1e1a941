// Adds the partial sum of one worker to a total.
#include "entry.h"

namespace {

template <class T> struct Sum {
    T *total;
    const T *part;
    int64_t count;
};

}  // namespace

EXPORT_SIZE(Scalar, SCALAR)
EXPORT_SIZE(Sum, Sum<SCALAR>)

extern "C" int32_t add_up(const Sum<SCALAR> *sum) {
    return guarded(sum->count == 0 || (sum->count > 0 && sum->total && sum->part), [&] {
        for (int64_t i = 0; i < sum->count; i++) sum->total[i] += sum->part[i];
    });
}
