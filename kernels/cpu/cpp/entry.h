// Helpers of the functions that Python calls. Each checks the sizes in its arguments, catches all exceptions and returns
// a code. Each struct that structs.py mirrors exports its size, which Python compares when it loads the library, and so
// does the scalar.
#pragma once

#include <cstdint>

namespace {

enum Code : int32_t { DONE = 0, NO_MEMORY = 1, WRONG_SIZES = 2 };  // as in schedule.py

// Runs f and returns DONE, or NO_MEMORY if it throws; returns WRONG_SIZES at once if the sizes do not fit.
template <class F> inline int32_t guarded(bool fits, F f) noexcept {
    if (!fits) return WRONG_SIZES;
    try {
        f();
        return DONE;
    } catch (...) {
        return NO_MEMORY;
    }
}

// True if items `start` to `start + count` - 1 lie within `total` items.
inline bool is_part(int64_t start, int64_t count, int64_t total) {
    return start >= 0 && count >= 0 && start <= total && count <= total - start;
}

}  // namespace

#define EXPORT_SIZE(NAME, ...) \
    extern "C" int64_t size_of_##NAME() { return sizeof(__VA_ARGS__); }
