// Gathers the item vector of each row for the sequence encoder, and adds the rows' gradients to those of the items.
#include "entry.h"

namespace {

template <class T> struct Rows {
    int32_t rows, items, width;  // R, V, d
    const int64_t *inputs;       // [R]: each row's item
    T *vectors;                  // [V, d]
    T *x;                        // [R, d]
};

template <class T> void gather(const Rows<T> &r) {
    const long d = r.width;
    for (long row = 0; row < r.rows; row++)
        for (long c = 0; c < d; c++) r.x[row * d + c] = r.vectors[r.inputs[row] * d + c];
}

template <class T> void add(const Rows<T> &r) {
    const long d = r.width;
    for (long row = 0; row < r.rows; row++)
        for (long c = 0; c < d; c++) r.vectors[r.inputs[row] * d + c] += r.x[row * d + c];
}

// True if the item of every row exists.
template <class T> bool fits(const Rows<T> &r) {
    if (r.rows < 0 || r.width <= 0) return false;
    for (int row = 0; row < r.rows; row++)
        if (r.inputs[row] < 0 || r.inputs[row] >= r.items) return false;
    return true;
}

}  // namespace

EXPORT_SIZE(Rows, Rows<SCALAR>)

extern "C" {
int32_t gather_rows(const Rows<SCALAR> *rows) {
    return guarded(fits(*rows), [&] { gather(*rows); });
}
int32_t add_rows(const Rows<SCALAR> *rows) {
    return guarded(fits(*rows), [&] { add(*rows); });
}
}
