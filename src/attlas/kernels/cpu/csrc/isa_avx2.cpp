#define TABLE attlas_kernels_avx2
#include "isa.inc"
