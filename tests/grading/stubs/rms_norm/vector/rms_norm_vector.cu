// Lab: RMSNorm of one long vector. Fill in the TODOs, then grade:  python rms_norm/vector/grade.py
//
//     output[i] = input[i] / sqrt(mean over the vector of input^2 + epsilon) * weight[i]        for 0 <= i < cols
//
// input, weight and output are device pointers. Any cols >= 1 must work. The call must not change its inputs. One block
// cannot feed a GPU: the whole grid shares the vector, so the sum crosses blocks (cooperative groups).
// README.md in this folder has the idea, a figure, and how it is graded.
#include "rms_norm_vector.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace cg = cooperative_groups;

__global__ void rms_norm_vector_kernel(const float *input, const float *weight, float *output, int cols, float epsilon) {
    cg::grid_group grid = cg::this_grid();
    // TODO 2: let each thread add up the squares of its share (grid.thread_rank(), + grid.size(), ...).
    // TODO 3: add the sums of a block's threads, as in the matrix lab.
    // TODO 4: add the sums of the blocks: where do they go, and who sets it to zero? grid.sync() lets all blocks wait
    //         for each other.
    // TODO 5: scale: every thread its share.
}

void rms_norm_vector(float *input, float *weight, float *output, int cols, float epsilon) {
    // TODO 1: launch with cudaLaunchCooperativeKernel, with no more blocks than the device can run at once:
    //         cudaOccupancyMaxActiveBlocksPerMultiprocessor, times the number of multiprocessors.
    // TODO 6: it is right: now make it fast. README.md says what limits it.
}
