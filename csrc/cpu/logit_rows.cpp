// The row kernels' entry points: arguments checked, rows shared out among threads.
#include "level.h"
#include "threads.h"

namespace {

bool is_type(int type) { return type == STROP_FLOAT32 || type == STROP_BFLOAT16 || type == STROP_FLOAT16; }

bool is_sound(const strop_logits &rows) {
  return rows.num_rows >= 0 && rows.vocab > 0 && is_type(rows.logit_type) && (!rows.bias || is_type(rows.bias_type)) &&
         rows.softcap >= 0;
}

// A part of the rows takes some 10 us: enough to pay for handing it out, few enough to keep the threads busy to the end.
int64_t rows_at_once(int64_t vocab) { return vocab >= 32768 ? 1 : 32768 / vocab; }

}  // namespace

extern "C" int strop_cpu_logit_statistics(const strop_logits *rows, int partial, float *out) {
  if (!is_sound(*rows)) return STROP_BAD_ARGUMENT;
  const StropKernels &kernels = strop_kernels();
  in_parallel(rows->num_rows, rows_at_once(rows->vocab), [&](int64_t first, int64_t last) {
    kernels.logit_statistics(*rows, partial != 0, out, first, last);
  });
  return STROP_OK;
}

extern "C" int strop_cpu_logit_gradient(const strop_logits *rows, const float *logprob, const float *entropy,
                                        const float *logsumexp, const float *g, const float *h, const float *k, void *out,
                                        int out_type, int64_t out_stride) {
  if (!is_sound(*rows) || !is_type(out_type)) return STROP_BAD_ARGUMENT;
  const StropKernels &kernels = strop_kernels();
  const StropGradient gradient{logprob, entropy, logsumexp, g, h, k, out, out_type, out_stride};
  in_parallel(rows->num_rows, rows_at_once(rows->vocab), [&](int64_t first, int64_t last) {
    kernels.logit_gradient(*rows, gradient, first, last);
  });
  return STROP_OK;
}
