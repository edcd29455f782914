#define DENSE_TABLE attlas_dense_avx2
#include "linear.h"
