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
#define STROP_ABI_VERSION 3

typedef enum {
  STROP_OK = 0,
  STROP_BAD_ARGUMENT = 1,  /* a size below 0, an unknown choice, a group index outside 0..n-1 */
  STROP_OUT_OF_MEMORY = 2, /* host memory for group sums */
  STROP_LAUNCH_FAILED = 3  /* the CUDA runtime refused the launch: strop_cuda_last_error() has its number */
} strop_status;

typedef enum { STROP_SCALE_GROUP = 0, STROP_SCALE_BATCH = 1, STROP_SCALE_NONE = 2 } strop_scale;
typedef enum { STROP_BASELINE_MEAN = 0, STROP_BASELINE_LEAVE_ONE_OUT = 1 } strop_baseline;

int strop_cpu_abi_version(void);

/* The vector instructions that strop_cpu_* use: the best of this CPU. strop_cpu_set_level chooses lower ones, which tests do;
 * STROP_BAD_ARGUMENT where the CPU lacks them. */
typedef enum { STROP_LEVEL_BASELINE = 0, STROP_LEVEL_AVX2 = 1, STROP_LEVEL_AVX512 = 2 } strop_level;
int strop_cpu_level(void);
int strop_cpu_set_level(int level);

/* y[i] = f(x[i]), float [count], by the functions inside the kernels, whose errors csrc/cpu/simd.h states and tests measure. */
typedef enum {
  STROP_FUNCTION_EXP = 0,
  STROP_FUNCTION_EXPM1 = 1,
  STROP_FUNCTION_TANH = 2,
  STROP_FUNCTION_TANH_SLOPE = 3 /* 1 - tanh^2 */
} strop_function;
int strop_cpu_elementary(int function, const float *x, float *y, int64_t count);

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

/* Row kernels of a softmax over logits [num_rows, vocab], rows `row_stride` elements apart, columns next to each other.
 * z = softcap * tanh((u + bias) / softcap) * inverse_temperature, u the logit; softcap 0 means none. p is the softmax of z
 * over the tokens with keep_mask != 0 (all of them where it is NULL).
 * logit_type, out_type, bias_type: strop_type. inverse_temperature: float [num_rows], or NULL for `scale` in every row.
 * targets: int64 [num_rows], a column; outside 0..vocab-1 it lies in another shard; STROP_IGNORED marks a row that
 * counts for nothing: its logits are not read. */
typedef enum { STROP_BITS = 0, STROP_FLOAT32 = 1, STROP_BFLOAT16 = 2, STROP_FLOAT16 = 3 } strop_type;
#define STROP_IGNORED INT64_MIN

typedef struct {
  const void *logits;
  int64_t num_rows, vocab, row_stride;
  int32_t logit_type, bias_type;
  const int64_t *targets;
  const float *inverse_temperature;
  float scale, softcap;
  const void *bias;         /* [vocab] or NULL */
  const uint8_t *keep_mask; /* [num_rows, vocab], rows mask_stride apart, or NULL */
  int64_t mask_stride;
} strop_logits;

/* partial != 0: out float [5, num_rows] = maximum of z (-inf without a kept token), sum e^(z - max), sum e^(z - max) (z - max),
 * the target's z (0 if elsewhere), 1 if the target is here else 0: shards join them. An ignored row gives -inf, 0, 0, 0, 0.
 * partial == 0: out float [3, num_rows] = log-prob, entropy, logsumexp; a target that isn't here gives NaN, ignored rows 0. */
int strop_cpu_logit_statistics(const strop_logits *rows, int partial, float *out);
int strop_cuda_logit_statistics(const strop_logits *rows, int partial, float *out, void *stream);

/* out [num_rows, vocab], rows out_stride apart, out_type: the gradient of the logits u,
 * dz_j = g (1[j = y] - p_j) - h p_j (log p_j + entropy) + k p_j through 1/T, softcap. out may be the logits themselves.
 * g, h, k: float [num_rows], the gradients of log-prob, entropy and logsumexp; NULL is 0. Rows in which all are 0, and
 * ignored rows, get 0. */
int strop_cpu_logit_gradient(const strop_logits *rows, const float *logprob, const float *entropy, const float *logsumexp,
                             const float *g, const float *h, const float *k, void *out, int out_type, int64_t out_stride);
int strop_cuda_logit_gradient(const strop_logits *rows, const float *logprob, const float *entropy, const float *logsumexp,
                              const float *g, const float *h, const float *k, void *out, int out_type, int64_t out_stride,
                              void *stream);

/* kernels/loss_code.py LossCode, in the same order; choices count from 0 in the order of kernels/specs.py. */
typedef struct {
  int32_t policy, divide_by_length, kl_estimator, kl_gradient, correction, has_opsm;
  float ratio_low, ratio_high, ratio_cap;
  float sapo_tau_positive, sapo_tau_negative;
  float vespo_k_positive, vespo_lambda_positive, vespo_k_negative, vespo_lambda_negative;
  float kl_coef, entropy_coef, correction_low, correction_high, opsm_delta, log_ratio_limit;
} strop_loss_code;

/* Token arrays are float [num_tokens] or NULL; mask: uint8. cu_seqlens: int64 [num_sequences + 1] or NULL (then the spec needs
 * no sequences, num_sequences is 0); tokens behind cu_seqlens[num_sequences] are padding. sequence_stats: float
 * [num_sequences, 6] (SEQUENCE_FIELDS of kernels/policy.py), or NULL: computed from the tokens. */
typedef struct {
  int64_t num_tokens, num_sequences;
  const float *logprob, *old_logprob, *advantages, *ref_logprob, *rollout_logprob, *entropy;
  const uint8_t *mask;
  const int64_t *cu_seqlens;
  const float *sequence_stats;
  const float *denominator; /* one number, on the device */
} strop_loss_tokens;

/* loss: float [1]; metrics: float, in the order of METRIC_FIELDS of kernels/metrics.py; d_logprob and d_entropy: float
 * [num_tokens], the loss's gradients (d_entropy NULL where entropy_coef is 0). */
int strop_cpu_policy_loss(const strop_loss_tokens *tokens, const strop_loss_code *code, float *loss, float *metrics,
                          float *d_logprob, float *d_entropy);
/* workspace: strop_cuda_policy_loss_workspace(...) bytes on the device, 0 before their first use and then left to one call at a
 * time. */
int strop_cuda_policy_loss(const strop_loss_tokens *tokens, const strop_loss_code *code, float *loss, float *metrics,
                           float *d_logprob, float *d_entropy, void *workspace, void *stream);
int64_t strop_cuda_policy_loss_workspace(int64_t num_tokens, int64_t num_sequences);

#ifdef __cplusplus
}
#endif

#endif
