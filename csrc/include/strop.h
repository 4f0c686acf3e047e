/* C interface of strop's native kernels: raw pointers, sizes and (CUDA) a stream in, an error code out.
 *
 * No function allocates for the caller, keeps a pointer or throws. Pointers are to contiguous memory: host memory for
 * strop_cpu_*, device memory of the current device for strop_cuda_*, whose work is queued on `stream` (a cudaStream_t).
 */
#ifndef STROP_H
#define STROP_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever a signature below does; kernels/native.py refuses another number. */
#define STROP_ABI_VERSION 2

typedef enum {
  STROP_OK = 0,
  STROP_BAD_ARGUMENT = 1,  /* a size below 0, an unknown choice, a group index outside 0..n-1 */
  STROP_OUT_OF_MEMORY = 2, /* host memory for group sums */
  STROP_LAUNCH_FAILED = 3  /* the CUDA runtime refused the launch: strop_cuda_last_error() has its number */
} strop_status;

typedef enum { STROP_SCALE_GROUP = 0, STROP_SCALE_BATCH = 1, STROP_SCALE_NONE = 2 } strop_scale;
typedef enum { STROP_BASELINE_MEAN = 0, STROP_BASELINE_LEAVE_ONE_OUT = 1 } strop_baseline;

int strop_cpu_abi_version(void);
int strop_cuda_abi_version(void);
int strop_cuda_last_error(void);

/* advantages[i] = (rewards[i] - mean of its group) / (std + eps), see strop.kernels.group_advantage.
 * rewards, advantages: float [n]; group_index: [n], values in 0..n-1 (the CUDA kernel trusts them); ddof: 0 or 1.
 * counts: int64 [4] = finite rewards, other rewards, groups with a finite reward, groups of equal rewards. */
int strop_cpu_group_advantage(const float *rewards, const int64_t *group_index, int64_t n, int scale,
                              int baseline, int ddof, double eps, float *advantages, int64_t *counts);
int strop_cuda_group_advantage(const float *rewards, const int64_t *group_index, int64_t n, int scale,
                               int baseline, int ddof, double eps, float *advantages, int64_t *counts,
                               void *stream);

/* Copies `count` strided rectangles, converting between float32, bfloat16 and float16. table: int64 [count][11] in host
 * memory, read before the function returns: source and destination address, rows, columns (both above 0), source row and
 * column stride, destination row and column stride (in elements), source and destination type, bytes of a source element.
 * Types: 1 float32, 2 bfloat16, 3 float16, 0 any other, whose bits are copied. */
int strop_cuda_multi_tensor_copy(const int64_t *table, int64_t count, void *stream);

#ifdef __cplusplus
}
#endif

#endif
