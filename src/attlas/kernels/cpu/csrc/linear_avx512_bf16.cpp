#define DENSE_TABLE attlas_dense_avx512_bf16
#include "linear.h"
