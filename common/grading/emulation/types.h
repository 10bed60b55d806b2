// The vocabulary of CUDA that is only data: dim3, the vector types, function and variable qualifiers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdlib.h>
#include <cstring>
#include <math.h>  // and not <cmath>: abs, exp, isnan of a float without std::, as in CUDA
#include <cfloat>
#include <climits>

// Everything is compiled for one machine, so "where a function runs" says nothing to the compiler.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__ __restrict
// `__shared__` has no macro: rewrite.py turns each declaration into a look-up in the running block's own memory.

// The alignments are CUDA's: a float4 at an address that is no multiple of 16 is an error on a GPU, and the
// alignment sanitiser reports it here because the type says so.
#define EMU_VECTORS(T, name, a2, a4)                                                                      \
    struct name##1 { T x; };                                                                              \
    struct alignas(a2) name##2 { T x, y; };                                                               \
    struct name##3 { T x, y, z; };                                                                        \
    struct alignas(a4) name##4 { T x, y, z, w; };                                                         \
    inline name##1 make_##name##1(T x) { return {x}; }                                                    \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                            \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                    \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(double, double, 16, 16)
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(unsigned int, uint, 8, 16)
EMU_VECTORS(unsigned char, uchar, 2, 4)
#undef EMU_VECTORS

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
