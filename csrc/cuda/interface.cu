// What every user of the library asks first, whichever kernels it calls.
#include "launch.h"

extern "C" int strop_cuda_abi_version(void) { return STROP_ABI_VERSION; }

extern "C" int strop_cuda_last_error(void) { return strop_last_error; }
