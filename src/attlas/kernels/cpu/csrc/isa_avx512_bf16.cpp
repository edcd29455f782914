#define TABLE attlas_kernels_avx512_bf16
#include "isa.inc"
