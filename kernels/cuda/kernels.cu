// All kernels as one module.
#include "rows.cu"
#include "norm.cu"
#include "rope.cu"
#include "attention.cu"
#include "gemm.cu"
#include "sample.cu"
