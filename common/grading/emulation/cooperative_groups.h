// Cooperative groups: the whole grid, the block, tiles of a warp.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

class grid_group {
  public:
    void sync(int line = __builtin_LINE()) const { emu::grid_barrier(line); }
    bool is_valid() const { return true; }
    unsigned long long num_blocks() const { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
    unsigned long long block_rank() const {
        return blockIdx.x + 1ull * gridDim.x * (blockIdx.y + 1ull * gridDim.y * blockIdx.z);
    }
    unsigned long long num_threads() const { return num_blocks() * blockDim.x * blockDim.y * blockDim.z; }
    unsigned long long size() const { return num_threads(); }
    unsigned long long thread_rank() const { return block_rank() * (blockDim.x * blockDim.y * blockDim.z) + emu::self().rank; }
};

class thread_block {
  public:
    void sync(int line = __builtin_LINE()) const { emu::block_barrier(line); }
    unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
    unsigned size() const { return num_threads(); }
    unsigned thread_rank() const { return emu::self().rank; }
    dim3 group_index() const { return blockIdx; }
    dim3 thread_index() const { return threadIdx; }
    dim3 group_dim() const { return blockDim; }
    dim3 dim_threads() const { return blockDim; }
};

template <unsigned Size, class Parent = thread_block> class thread_block_tile {
    static_assert(Size && Size <= 32 && (Size & (Size - 1)) == 0, "emulation: tiles of 1, 2, 4, 8, 16 or 32 threads");
    unsigned first() const { return emu::self().rank % 32 / Size * Size; }
    unsigned mask() const { return (Size == 32 ? 0xffffffffu : (1u << Size % 32) - 1) << first(); }

  public:
    void sync(int line = __builtin_LINE()) const { emu::warp_sync(mask(), line); }
    static constexpr unsigned num_threads() { return Size; }
    static constexpr unsigned size() { return Size; }
    unsigned thread_rank() const { return emu::self().rank % Size; }
    unsigned meta_group_rank() const { return emu::self().rank / Size; }
    unsigned meta_group_size() const { return (blockDim.x * blockDim.y * blockDim.z + Size - 1) / Size; }
#define EMU_TILE_SHFL(name, rule)                                                        \
    template <class T> T name(T v, int argument, int line = __builtin_LINE()) const {    \
        return emu::shuffle(mask(), v, emu::rule(argument, Size), line);                 \
    }
    EMU_TILE_SHFL(shfl, lane_indexed)
    EMU_TILE_SHFL(shfl_up, lane_up)
    EMU_TILE_SHFL(shfl_down, lane_down)
    EMU_TILE_SHFL(shfl_xor, lane_xor)
#undef EMU_TILE_SHFL
    unsigned ballot(int p, int line = __builtin_LINE()) const { return emu::vote(mask(), p, line) >> first(); }
    int any(int p, int line = __builtin_LINE()) const { return emu::vote(mask(), p, line) != 0; }
    int all(int p, int line = __builtin_LINE()) const { return emu::vote(mask(), !p, line) == 0; }
};

inline grid_group this_grid() { return {}; }
inline thread_block this_thread_block() { return {}; }
template <unsigned Size, class G> thread_block_tile<Size, G> tiled_partition(const G &) { return {}; }
template <class G> void sync(const G &group, int line = __builtin_LINE()) { group.sync(line); }

}  // namespace cooperative_groups
