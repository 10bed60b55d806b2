// cooperative_groups::reduce over a tile: every thread gets the result.
#pragma once
#include "../cooperative_groups.h"

namespace cooperative_groups {

template <class T> struct plus { T operator()(T a, T b) const { return a + b; } };
template <class T> struct less { T operator()(T a, T b) const { return b < a ? b : a; } };
template <class T> struct greater { T operator()(T a, T b) const { return a < b ? b : a; } };

template <unsigned Size, class G, class T, class Op>
T reduce(const thread_block_tile<Size, G> &tile, T value, Op op, int line = __builtin_LINE()) {
    for (unsigned bits = Size / 2; bits > 0; bits /= 2) value = op(value, tile.shfl_xor(value, bits, line));
    return value;
}

}  // namespace cooperative_groups
