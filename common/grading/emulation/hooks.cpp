// The compiler's -fsanitize=thread puts a call in front of every memory access. We give those calls our own meaning:
// in the `interleaved` order a thread may lose the CPU there. `x += 1` without atomicAdd, read by two threads before
// either writes, then loses an addition, as on a GPU. (The race detector that belongs to the option is not linked.)
#include "scheduler.h"

#define EMU_HOOK(name) extern "C" void name(void *) { emu::preempt(); }
EMU_HOOK(__tsan_read1) EMU_HOOK(__tsan_read2) EMU_HOOK(__tsan_read4) EMU_HOOK(__tsan_read8) EMU_HOOK(__tsan_read16)
EMU_HOOK(__tsan_write1) EMU_HOOK(__tsan_write2) EMU_HOOK(__tsan_write4) EMU_HOOK(__tsan_write8) EMU_HOOK(__tsan_write16)
EMU_HOOK(__tsan_unaligned_read2) EMU_HOOK(__tsan_unaligned_read4) EMU_HOOK(__tsan_unaligned_read8)
EMU_HOOK(__tsan_unaligned_read16) EMU_HOOK(__tsan_unaligned_write2) EMU_HOOK(__tsan_unaligned_write4)
EMU_HOOK(__tsan_unaligned_write8) EMU_HOOK(__tsan_unaligned_write16)
EMU_HOOK(__tsan_volatile_read1) EMU_HOOK(__tsan_volatile_read2) EMU_HOOK(__tsan_volatile_read4)
EMU_HOOK(__tsan_volatile_read8) EMU_HOOK(__tsan_volatile_write1) EMU_HOOK(__tsan_volatile_write2)
EMU_HOOK(__tsan_volatile_write4) EMU_HOOK(__tsan_volatile_write8) EMU_HOOK(__tsan_vptr_read)
extern "C" {
void __tsan_read_range(void *, size_t) { emu::preempt(); }
void __tsan_write_range(void *, size_t) { emu::preempt(); }
void __tsan_vptr_update(void **, void *) {}
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
// A function's static variables are guarded by an atomic byte.
char __tsan_atomic8_load(const volatile char *p, int) { return *p; }
}
