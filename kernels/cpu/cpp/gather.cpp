// Copies rows of a table of hidden states into panels.
#include "panels.h"

namespace {

// The arguments of a call that copies rows of a table [., K, D] into panel matrices [K][total, D], for the items `start`
// to `start + count` - 1.
struct Gather {
    const void *table;
    const int64_t *rows;  // the row of each item; null: item n is row n
    void *panels;
    int64_t item, layer;  // strides of the table in numbers: from row to row, from layer to layer
    int32_t bytes, layers, width, total, start, count;  // bytes of a number: 2, 4 or 8
};

template <class S> void gather(const Gather &g) {
    const int wide = panels(g.width);
    for (int n = g.start; n < g.start + g.count; n++) {
        const S *row = (const S *)g.table + (g.rows ? g.rows[n] : n) * g.item;
        for (int k = 0; k < g.layers; k++)
            for (int j = 0; j < wide; j++) {
                S *to = (S *)g.panels + (((long)k * wide + j) * g.total + n) * PANEL;
                const S *from = row + k * g.layer + j * PANEL;
                const int here = smaller(PANEL, g.width - j * PANEL);
                if (here == PANEL) std::memcpy(to, from, sizeof(S) * PANEL);  // of constant size: two instructions
                else
                    for (int c = 0; c < PANEL; c++) to[c] = c < here ? from[c] : S(0);
            }
    }
}

bool fits(const Gather &g) {
    const bool known = g.bytes == 2 || g.bytes == 4 || g.bytes == 8;
    return known && g.layers > 0 && g.width > 0 && is_part(g.start, g.count, g.total) && (!g.count || (g.table && g.panels));
}

}  // namespace

EXPORT_SIZE(Gather, Gather)

extern "C" int32_t gather_panels(const Gather *rows) {
    return guarded(fits(*rows), [&] {
        if (rows->bytes == 2) gather<uint16_t>(*rows);
        if (rows->bytes == 4) gather<uint32_t>(*rows);
        if (rows->bytes == 8) gather<uint64_t>(*rows);
    });
}
