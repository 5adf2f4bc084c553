// Loops over arrays of vectors that are to be registers.
#pragma once

// Indices of arrays that are to be registers must be known when compiling.
#if defined(__clang__)
#define PADST_UNROLL _Pragma("unroll")
#else
#define PADST_UNROLL _Pragma("GCC unroll 16")
#endif

