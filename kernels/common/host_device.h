#pragma once

// Functions marked DGF_HD are one element's arithmetic: the same text serves the CPU loop and a GPU thread.
#if defined(__CUDACC__)
#define DGF_HD __host__ __device__ __forceinline__
// Rare paths: called, so that they neither cost the common one registers nor the build minutes.
#define DGF_RARE __host__ __device__ __noinline__
#define DGF_UNROLL _Pragma("unroll")
#define DGF_NO_UNROLL _Pragma("unroll 1")
#else
#define DGF_HD inline __attribute__((always_inline))
#define DGF_RARE inline __attribute__((noinline))
#define DGF_UNROLL
#define DGF_NO_UNROLL
#endif
