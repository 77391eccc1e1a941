// What every function that Python calls has in common: it checks the sizes it is given, lets no exception out and returns
// a code. Each struct that Python mirrors (structs.py) exports its size, which is compared when the library is loaded.
#pragma once

#include <cstdint>

namespace {

enum Code : int32_t { DONE = 0, NO_MEMORY = 1, WRONG_SIZES = 2 };  // as in library.py

// Runs f if the sizes fit.
template <class F> inline int32_t guarded(bool fits, F f) noexcept {
    if (!fits) return WRONG_SIZES;
    try {
        f();
        return DONE;
    } catch (...) {
        return NO_MEMORY;
    }
}

// Items `start` to `start + count` lie among `total`.
inline bool is_part(int64_t start, int64_t count, int64_t total) {
    return start >= 0 && count >= 0 && start <= total && count <= total - start;
}

}  // namespace

#define EXPORT_SIZE(NAME, ...) \
    extern "C" int64_t size_of_##NAME() { return sizeof(__VA_ARGS__); }
