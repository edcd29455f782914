#define SCAN_TABLE attlas_scan_avx2
#include "scan.h"
