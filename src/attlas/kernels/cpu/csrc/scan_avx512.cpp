#define SCAN_TABLE attlas_scan_avx512
#include "scan.h"
