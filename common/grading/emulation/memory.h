// The emulated device: its size, and its memory. Every allocation is a heap block of exactly the size asked for, so
// AddressSanitizer sees its ends; it starts filled with the pattern $EMU_FILL (the grader runs two: a result that
// follows the pattern came from memory that was never written). Host code must not touch device memory: outside
// launches and copies it is poisoned.
#pragma once
#include "types.h"

namespace emu {

// A small GPU: small enough that a cooperative grid's stacks fit in memory, and that a grid which assumes a big GPU fails.
constexpr unsigned kMultiprocessors = 4, kThreadsPerMultiprocessor = 1024, kBlocksPerMultiprocessor = 16;
constexpr size_t kSharedPerBlock = 48 * 1024, kSharedPerBlockOptIn = 227 * 1024, kSharedPerMultiprocessor = 228 * 1024;

void *allocate_filled(size_t bytes, size_t alignment);
unsigned resident_blocks(int threads_per_block, size_t shared_bytes);  // a multiprocessor
size_t shared_memory_limit();
void count_launch();

class DeviceMemoryOpen {  // device memory is reachable while one of these lives
  public:
    DeviceMemoryOpen();
    ~DeviceMemoryOpen();
};

// Memory of malloc or new that a kernel is handed: no GPU can reach it, so it is out of reach while the kernel runs.
void shut_host_memory(const void *pointer);
void open_host_memory();
void check_argument(const void *address);  // an entry of the array of a launch's arguments

// For the harness
struct Counts { size_t launches, copies, allocated_bytes; };
Counts counts();
void name_buffer(const char *name, const void *start, size_t bytes);  // the caller's: a call must not free it
void give_back(const void *start);  // it may be freed now

}  // namespace emu
