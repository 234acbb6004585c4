#include "gemm.h"
#include "columns.h"
STABLE_TORCH_LIBRARY_FRAGMENT(sslkern_native, m) {}
