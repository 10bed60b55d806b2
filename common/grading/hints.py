"""What to look at next, by lesson: shown with --hint, never unasked."""

from common.grading.lab import Lab

HINTS = {
    "not-started": "Do the TODOs in order and grade after each: after the first the outcome becomes `wrong`.",
    "does-not-compile": "Read the first error only; later ones often follow from it.",
    "blocked": "Do without what is named, or grade on a machine with a GPU: this outcome says nothing about your file.",
    "device-code-on-host": "A kernel runs through kernel<<<blocks, threads>>>(...); threadIdx exists only inside.",
    "divergent-barrier": "Which `return`, `if` or loop bound before a __syncthreads() differs between threads?",
    "warp-hang": "Every lane that the mask names must execute the same warp operation. Move it out of the `if`.",
    "shuffle-mask": "Use 0xffffffff where all lanes take part, and let all lanes take part.",
    "grid-sync-launch": "Replace <<<...>>> by cudaLaunchCooperativeKernel((void *)kernel, grid, block, arguments).",
    "cooperative-too-large": "Multiprocessors x blocks that fit on one; each thread then loops.",
    "launch-shape": "Fix the block at 256 threads, say, and round the blocks up: (n + 255) / 256, not n / 256.",
    "launch-shared-memory": "48 KiB a block without asking for more: a partial sum a warp needs 128 bytes.",
    "copy-direction": "The last argument names from where to where: host to device, or device to host.",
    "copy-out-of-bounds": "Count bytes, not elements: sizeof(float) belongs into width and pitch.",
    "out-of-bounds": "The last block has threads without work: compare the index with the length before using it.",
    "launch-error": "Look at what every call returns: puts(cudaGetErrorString(cudaGetLastError())); after each.",
    "copy-pitch": "Width: sizeof(float). Source pitch: cols * sizeof(float). Target pitch: sizeof(float).",
    "local-array": "void *arguments[] = {&input, &weight, ...}: as many as the kernel has parameters, in their order.",
    "dynamic-shared": "kernel<<<blocks, threads, threads * sizeof(float)>>>(...): bytes, not elements.",
    "kernel-arguments": "void *arguments[] = {&input, &weight, &output, &cols, &epsilon};",
    "nothing-written": "The pointer that you were given is the only one that the caller looks at.",
    "caller-memory": "cudaFree is for what the function itself has allocated.",
    "host-touches-device": "Device pointers are for kernels and cudaMemcpy only.",
    "device-touches-host": "Memory of cudaMalloc (or cudaHostAlloc) for the kernel; cudaMemcpy to and from the host's.",
    "misaligned": "float4 needs an address that is a multiple of 16: is every row's start one, when cols is odd?",
    "endless": "Which loop's condition can stay true? A stride that becomes 0 is a usual suspect.",
    "input-changed": "Write to `output` only.",
    "leak": "Every cudaMalloc in the function needs its cudaFree, or a buffer that is kept and reused.",
    "race": "Between writing shared memory and reading another thread's part of it stands a __syncthreads(); before the"
    " memory is used again stands another. A sum that several blocks add to needs atomicAdd.",
    "state-kept": "Which __device__ or static variable must be set to 0 at the start of each call?",
    "uninitialised": "Shared and device memory start with whatever was there. Set accumulators to 0 before adding.",
    "local-not-set": "float sum = 0.0f; what all threads need goes through shared memory, with a __syncthreads();"
    " where a call sets a pointer, look at the call's error.",
    "tail-dropped": "`cols / blockDim.x` rounds down. Loop `for (i = threadIdx.x; i < cols; i += blockDim.x)`.",
    "tail-unwritten": "A grid of `n / block` blocks rounds down: (n + block - 1) / block, and a guard.",
    "one-element-a-thread": "When there are more elements than threads, a thread must take more than one.",
    "odd-halving": "96 threads halve to 48, 24, 12, 6, 3, 1: who adds the third? Use 2^k threads, or warp shuffles.",
    "half-warp": "for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffff, sum, step);",
    "counted-often": "if (threadIdx.x % 32 == 0) before the atomicAdd of a warp's sum.",
    "one-lane": "__shfl_xor_sync gives every lane the sum; or lane 0 writes it to shared memory.",
    "no-kernel": "A __global__ function and its launch, kernel<<<blocks, threads>>>(...): the GPU is to do the work.",
    "rows-missing": "How many rows does the grid cover? One block a row needs `rows` blocks, in x (y ends at 65,535).",
}


def hint_for(lab: Lab, lesson: str) -> str:
    return lab.hints.get(lesson) or HINTS.get(lesson) or "Run the smallest failing case alone with --case, and print."
