#define DENSE_TABLE attlas_dense_avx512
#include "linear.h"
