// Matrices in panels of 16 columns, and the matrix product that all functions use.
//
// A panel matrix [N, C] is stored as [ceil(C / 16)][N][16], padded with zeros. A block of columns is contiguous, so it
// stays in a core's cache, and its rows are whole cache lines.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "entry.h"

namespace {

// For functions and lambdas of the innermost loops: without inlining their sums would be in memory, not in registers.
#define INLINED __attribute__((always_inline))

constexpr int PANEL = 16;       // columns
constexpr int BLOCK = 6;        // panels of the state that a pass works on together
constexpr int MOST_ROWS = 6;    // rows of a register tile: 6 x 16 floats fill twelve of sixteen 32-byte registers
constexpr int BYTES = 32;       // size of a register

template <class T> struct Lanes;
template <> struct Lanes<float> { typedef float type __attribute__((vector_size(BYTES), aligned(4), may_alias)); };
template <> struct Lanes<double> { typedef double type __attribute__((vector_size(BYTES), aligned(8), may_alias)); };

template <class T> using Vector = typename Lanes<T>::type;
template <class T> constexpr int LANES = BYTES / sizeof(T);
template <class T> constexpr int PARTS = PANEL / LANES<T>;  // vectors of a panel's row

inline Vector<float> broadcast(float a) { return Vector<float>{a, a, a, a, a, a, a, a}; }
inline Vector<double> broadcast(double a) { return Vector<double>{a, a, a, a}; }

template <class T> struct Row {  // 16 numbers
    Vector<T> part[PARTS<T>];
};

template <class T> inline Row<T> load(const T *p) {
    Row<T> row;
    for (int i = 0; i < PARTS<T>; i++) row.part[i] = *(const Vector<T> *)(p + i * LANES<T>);
    return row;
}

template <class T> inline void store(T *p, const Row<T> &row) {
    for (int i = 0; i < PARTS<T>; i++) *(Vector<T> *)(p + i * LANES<T>) = row.part[i];
}

template <class T> inline T sum(const Row<T> &row) {
    Vector<T> total = row.part[0];
    for (int i = 1; i < PARTS<T>; i++) total += row.part[i];
    T out = 0;
    for (int i = 0; i < LANES<T>; i++) out += total[i];
    return out;
}

template <class T> inline T sum(const T *a, long count) {
    Vector<T> total = {};
    long i = 0;
    for (; i + LANES<T> <= count; i += LANES<T>) total += *(const Vector<T> *)(a + i);
    T out = 0;
    for (int lane = 0; lane < LANES<T>; lane++) out += total[lane];
    for (; i < count; i++) out += a[i];
    return out;
}

template <class T> inline T dot(const T *a, const T *b, long count) {
    Vector<T> total = {};
    long i = 0;
    for (; i + LANES<T> <= count; i += LANES<T>) total += *(const Vector<T> *)(a + i) * *(const Vector<T> *)(b + i);
    T out = 0;
    for (int lane = 0; lane < LANES<T>; lane++) out += total[lane];
    for (; i < count; i++) out += a[i] * b[i];
    return out;
}

template <class T> inline void add(Row<T> &to, const Row<T> &row) {
    for (int p = 0; p < PARTS<T>; p++) to.part[p] += row.part[p];
}

// The sum of a panel's rows, in four independent sums, so that an addition need not wait for the one before.
template <class T> inline Row<T> column_sums(const T *panel, int count) {
    Row<T> run[4] = {};
    int n = 0;
    for (; n + 4 <= count; n += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) add(run[i], load(panel + (n + i) * PANEL));
    for (; n < count; n++) add(run[0], load(panel + n * PANEL));
    add(run[0], run[1]);
    add(run[2], run[3]);
    add(run[0], run[2]);
    return run[0];
}

// True if the number of columns is a positive multiple of 16.
inline bool are_panels(int columns) { return columns > 0 && columns % PANEL == 0; }

inline int panels(int columns) { return (columns + PANEL - 1) / PANEL; }
inline int smaller(int a, int b) { return a < b ? a : b; }

// Write zeros to `count` numbers, and copy them; pointers may be null if there are none.
template <class T> inline void clear(T *to, long count) {
    if (count) std::memset(to, 0, sizeof(T) * count);
}
template <class T> inline void copy(T *to, const T *from, long count) {
    if (count) std::memcpy(to, from, sizeof(T) * count);
}

// The left operand of a product: its element (row i, step k) is data[i * row + k * step]; products sum over steps.
template <class T> struct Operand {
    const T *data;
    long row, step;
};

// The rows of a panel matrix as the left operand; its panels are `panel` numbers apart, steps are its columns.
template <class T> struct PanelRows {
    const T *data;
    long panel;
};

template <class T> inline PanelRows<T> rows_of(const T *matrix, long n) { return {matrix, n * PANEL}; }

// The columns of one panel as rows of the left operand; steps are the rows of the matrix.
template <class T> inline Operand<T> columns_of(const T *panel) { return {panel, 1, PANEL}; }

// Calls f(0), f(1) .. f(R - 1) with compile-time constants, so that the arrays they index can stay in registers.
template <class F, int... I> inline INLINED void repeat(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int R, class F> inline INLINED void repeat(F f) { repeat(std::make_integer_sequence<int, R>{}, f); }

// Adds to acc[R] the product of one step of R left rows, a[i * row], with a row of 16 numbers of the right operand.
template <int R, class T>
inline INLINED void one_step(Row<T> (&acc)[R], const T *a, long row, const T *right) {
    const Row<T> factors = load(right);
    repeat<R>([&](auto i) INLINED {
        const Vector<T> scalar = broadcast(a[i * row]);
        repeat<PARTS<T>>([&](auto p) INLINED { acc[i].part[p] += scalar * factors.part[p]; });
    });
}

// Adds to acc[R] the product of R left rows, from `first` on, with right [steps][16], whose rows are `stride` apart.
template <int R, class T>
inline INLINED void multiply(
    Row<T> (&acc)[R], const Operand<T> &left, int first, const T *right, long stride, int steps) {
    const T *a = left.data + first * left.row;
#pragma GCC unroll 4
    for (int k = 0; k < steps; k++) one_step<R>(acc, a + k * left.step, left.row, right + k * stride);
}

template <int R, class T>
inline INLINED void multiply(
    Row<T> (&acc)[R], const PanelRows<T> &left, int first, const T *right, long stride, int steps) {
    const T *a = left.data + first * PANEL;
    int done = 0;
    for (; done + PANEL <= steps; done += PANEL, a += left.panel, right += PANEL * stride) {
#pragma GCC unroll 4
        for (int k = 0; k < PANEL; k++) one_step<R>(acc, a + k, PANEL, right + k * stride);
    }
    for (int k = 0; done + k < steps; k++) one_step<R>(acc, a + k, PANEL, right + k * stride);
}

// Computes R rows of left times right from `row` on and calls finish(row number, its 16 numbers) for each. `finish` gets
// a copy: an array that is indexed by a variable lies in memory, and the sums would too.
template <int R, class T, class Left, class Finish>
inline INLINED void row_tile(
    int row, const Left &left, const T *right, long stride, int steps, Finish &finish) {
    Row<T> acc[R];
    repeat<R>([&](auto i) INLINED {
        repeat<PARTS<T>>([&](auto p) INLINED { acc[i].part[p] = Vector<T>{}; });
    });
    multiply<R>(acc, left, row, right, stride, steps);
    repeat<R>([&](auto i) INLINED { finish(row + i, Row<T>(acc[i])); });
}

// Computes left [count, steps] times right [steps, 16], whose rows are `stride` apart, and calls finish(row number, its 16
// numbers) for each row.
template <class T, class Left, class Finish>
inline INLINED void product(
    int count, const Left &left, const T *right, long stride, int steps, Finish finish) {
    int row = 0;
    for (; row + MOST_ROWS <= count; row += MOST_ROWS) row_tile<MOST_ROWS>(row, left, right, stride, steps, finish);
    switch (count - row) {
        case 5: row_tile<5>(row, left, right, stride, steps, finish); break;
        case 4: row_tile<4>(row, left, right, stride, steps, finish); break;
        case 3: row_tile<3>(row, left, right, stride, steps, finish); break;
        case 2: row_tile<2>(row, left, right, stride, steps, finish); break;
        case 1: row_tile<1>(row, left, right, stride, steps, finish); break;
    }
}

// Like `product`, for the 16 columns of a panel as rows, in tiles of nearly equal size; finishes only the first `count`.
template <class T, class Finish>
inline INLINED void product_of_columns(
    int count, const Operand<T> &left, const T *right, long stride, int steps, Finish finish) {
    auto bounded = [&](int row, const Row<T> &numbers) INLINED {
        if (row < count) finish(row, numbers);
    };
    row_tile<6>(0, left, right, stride, steps, bounded);
    row_tile<5>(6, left, right, stride, steps, bounded);
    row_tile<5>(11, left, right, stride, steps, bounded);
}

// The numbers of a (places 0 to 7) and b (8 to 15) at the places `Order`.
template <int... Order> inline Vector<float> shuffled(const Vector<float> &a, const Vector<float> &b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, Order...);
#else
    typedef int Places __attribute__((vector_size(BYTES)));
    return __builtin_shuffle(a, b, Places{Order...});
#endif
}

// Transposes eight rows of eight floats in registers.
inline void transpose(float *to, long to_stride, const float *from, long from_stride) {
    Vector<float> a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = *(const Vector<float> *)(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) {
        b[i] = shuffled<0, 8, 1, 9, 4, 12, 5, 13>(a[i], a[i + 1]);
        b[i + 1] = shuffled<2, 10, 3, 11, 6, 14, 7, 15>(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = shuffled<0, 1, 8, 9, 4, 5, 12, 13>(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = shuffled<2, 3, 10, 11, 6, 7, 14, 15>(b[i + j], b[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        *(Vector<float> *)(to + i * to_stride) = shuffled<0, 1, 2, 3, 8, 9, 10, 11>(a[i], a[i + 4]);
        *(Vector<float> *)(to + (i + 4) * to_stride) = shuffled<4, 5, 6, 7, 12, 13, 14, 15>(a[i], a[i + 4]);
    }
}

inline void transpose(double *to, long to_stride, const double *from, long from_stride) {
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) to[j * to_stride + i] = from[i * from_stride + j];
}

// Writes out [steps][16], the transpose of `columns` rows of a matrix: out[k][c] = matrix[c][k] for c < columns, else 0.
template <class T> inline void pack_transposed(T *out, const T *matrix, long stride, int columns, int steps) {
    int whole = 0;
    if (columns == PANEL)
        for (; whole + 8 <= steps; whole += 8)
            for (int c = 0; c < PANEL; c += 8)
                transpose(out + whole * PANEL + c, PANEL, matrix + c * stride + whole, stride);
    for (int k = whole; k < steps; k++)
        for (int c = 0; c < PANEL; c++) out[k * PANEL + c] = c < columns ? matrix[c * stride + k] : T(0);
}

// Writes the first `columns` of 16 numbers.
template <class T> inline void put(T *p, const Row<T> &row, int columns) {
    if (columns == PANEL) store(p, row);
    else
        for (int c = 0; c < columns; c++) p[c] = row.part[c / LANES<T>][c % LANES<T>];
}

// Loads 16 bf16 numbers as T.
template <class T> inline Row<T> widened(const uint16_t *p) {
    typedef uint16_t Half __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));
    typedef uint32_t Word __attribute__((vector_size(BYTES)));
    Row<float> wide;
    for (int i = 0; i < PARTS<float>; i++)
        wide.part[i] = (Vector<float>)(__builtin_convertvector(((const Half *)p)[i], Word) << 16);
    if constexpr (std::is_same_v<T, float>) return wide;
    Row<T> wider;
    for (int c = 0; c < PANEL; c++) wider.part[c / LANES<T>][c % LANES<T>] = wide.part[c / LANES<float>][c % LANES<float>];
    return wider;
}

// Loads `columns` numbers, followed by zeros up to 16.
template <class T> inline Row<T> get(const T *p, int columns) {
    if (columns == PANEL) return load(p);
    Row<T> row = {};
    for (int c = 0; c < columns; c++) row.part[c / LANES<T>][c % LANES<T>] = p[c];
    return row;
}

// Writes out [steps][16], the first `columns` numbers of a matrix's rows, followed by zeros.
template <class T> inline void pack(T *out, const T *matrix, long stride, int columns, int steps) {
    for (int k = 0; k < steps; k++) store(out + k * PANEL, get(matrix + k * stride, columns));
}

}  // namespace
