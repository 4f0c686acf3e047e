// The kernels are compiled once for each level of vector instructions; at run time the best one that the CPU has is taken.
#pragma once

// C headers only, and before a level's source turns on instructions: an inline function or a template of the C++ library is
// shared by all object files, and the linker might keep the copy that uses what this CPU lacks.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../include/strop.h"

// The arguments of strop_cpu_logit_gradient behind the first.
struct StropGradient {
  const float *logprob, *entropy, *logsumexp, *g, *h, *k;
  void *out;
  int out_type;
  int64_t out_stride;
};

// The policy loss under one policy: of the tokens [first, last) of one sequence their sums [6], which are added to; and the
// losses of any tokens, with the sums [num_sequences][6] of all sequences.
struct StropPolicyLoss {
  void (*sequence_sums)(const strop_loss_tokens &, const strop_loss_code &, int64_t first, int64_t last, double *sums);
  void (*token_losses)(const strop_loss_tokens &, const strop_loss_code &, const float *sums, int64_t first, int64_t last,
                       double *metrics, float *d_logprob, float *d_entropy);
};

struct StropKernels {
  // Rows [first, last) of strop_cpu_logit_statistics and strop_cpu_logit_gradient.
  void (*logit_statistics)(const strop_logits &, bool partial, float *out, int64_t first, int64_t last);
  void (*logit_gradient)(const strop_logits &, const StropGradient &, int64_t first, int64_t last);
  const StropPolicyLoss *policy_losses;  // by strop_loss_code.policy
  // strop_cpu_elementary
  void (*elementary)(int function, const float *x, float *y, int64_t count);
};

extern const StropKernels strop_baseline_kernels;
#ifdef __x86_64__
extern const StropKernels strop_avx2_kernels, strop_avx512_kernels;
#endif

const StropKernels &strop_kernels();
