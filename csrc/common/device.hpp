// What lets a function compile twice: by nvcc for a GPU, and by the host's compiler.
#pragma once

#ifdef __CUDACC__
#define IQMPC_DEVICE __device__
#define IQMPC_BOTH __host__ __device__
#define IQMPC_NOINLINE __noinline__
#define IQMPC_UNROLL _Pragma("unroll")
#else
#define IQMPC_DEVICE
#define IQMPC_BOTH
#define IQMPC_NOINLINE
#define IQMPC_UNROLL
#endif
