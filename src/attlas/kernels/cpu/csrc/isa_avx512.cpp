#define TABLE attlas_kernels_avx512
#include "isa.inc"
