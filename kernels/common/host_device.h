#pragma once

// Functions marked DGF_HD are one element's arithmetic: the same text serves the CPU loop and a GPU thread.
#if defined(__CUDACC__)
#define DGF_HD __host__ __device__ __forceinline__
#else
#define DGF_HD inline __attribute__((always_inline))
#endif
