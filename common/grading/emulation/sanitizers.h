// AddressSanitizer's interface to programs that switch stacks and poison memory; without it the same calls do nothing.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
inline void __asan_poison_memory_region(const volatile void *, size_t) {}
inline int __asan_address_is_poisoned(const volatile void *) { return 0; }
inline void __asan_unpoison_memory_region(const volatile void *, size_t) {}
inline void __sanitizer_start_switch_fiber(void **, const void *, size_t) {}
inline void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) {}
#endif
