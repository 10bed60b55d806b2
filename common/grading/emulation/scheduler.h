// How the emulation runs a grid: each CUDA thread is a fiber (its own stack, switched by hand), and one CPU thread runs
// them in an order chosen by the grader. A fiber runs until it ends or waits at a barrier, a warp operation or a grid
// barrier; when nobody can run, either a barrier is complete and opens, or the program hangs, and we say who waits where.
//
// Why orders matter: on a GPU any interleaving is allowed. A kernel whose barriers are right gives the same answer in
// all of them; one that lacks a barrier gives different answers, so the grader runs ascending, descending and shuffled
// orders, and `interleaved`, where a fiber may also lose the CPU at any memory access (hooks.cpp).
#pragma once
#include "types.h"
#include <unistd.h>

namespace emu {

enum class Order { ascending, descending, shuffled, interleaved };
enum class State : uint8_t { fresh, ready, at_block_barrier, at_grid_barrier, at_warp, done };
enum class WarpOp : uint8_t { sync, shuffle, ballot };

struct Fiber;
struct Block;

struct Thread {
    State state = State::fresh;
    uint3 thread_idx{};
    uint3 block_idx{};
    unsigned rank = 0;  // within the block, x fastest
    Block *block = nullptr;
    Fiber *fiber = nullptr;
    int line = 0;  // where it waits
    int predicate = 0, predicate_count = 0;  // __syncthreads_count and its kin
    // One warp operation: what this lane gives, whose value it wants, what it got.
    WarpOp op{};
    unsigned mask = 0, source_lane = 0, ballot = 0;
    uint64_t value = 0, result = 0;
};

// A launch's shape, for gridDim and blockDim.
extern dim3 grid_dim, block_dim;

// The thread that runs now; a kernel's built-in variables on the host end the run with that finding.
Thread &self();

void block_barrier(int line, int predicate = 0);
void grid_barrier(int line);
void warp_wait(WarpOp op, unsigned mask, int line);
void preempt();  // called at memory accesses in the `interleaved` order

// Memory of the running block: one allocation a declaration, so that AddressSanitizer sees its ends.
void *shared_memory(const void *site, size_t bytes, size_t alignment);
void *dynamic_shared_memory();

// Runs `run(kernel)` in every thread: a kernel with its arguments bound. 0 or a cudaError_t. (<functional> would take
// longer to compile than most kernels.)
int launch(void (*run)(const void *), const void *kernel, dim3 grid, dim3 block, size_t shared_bytes, bool cooperative);
template <class F> int launch(const F &kernel, dim3 grid, dim3 block, size_t shared_bytes, bool cooperative) {
    auto run = [](const void *bound) { (*static_cast<const F *>(bound))(); };
    return launch(run, &kernel, grid, block, shared_bytes, cooperative);
}

// One line in the grader's progress file. `fatal` ends the process after it.
void write_finding(const char *kind, const char *text);
template <class... A> void finding(const char *kind, const char *format, A... arguments) {
    char text[512];
    snprintf(text, sizeof text, format, arguments...);
    write_finding(kind, text);
}
template <class... A> [[noreturn]] void fatal(const char *kind, const char *format, A... arguments) {
    finding(kind, format, arguments...);
    _exit(77);
}

}  // namespace emu
