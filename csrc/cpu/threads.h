// Work split over the OpenMP threads that torch uses.
//
// The library asks for libgomp.so.1, the name of the one inside torch's wheel, which is loaded already and in the global
// scope: both share one pool of threads. OpenMP keeps their number by calling thread, and torch sets it in a thread when torch
// first wants to know it there: so callers ask torch.get_num_threads() first (kernels/cpu). With one thread no parallel region
// is entered, so that a forked process, which has no pool any more, doesn't wait for it.
#pragma once

#include <omp.h>
#include <stdint.h>

// work(first, last) over parts of 0..count of at most `grain`, by whichever thread is free.
template <class Work>
void in_parallel(int64_t count, int64_t grain, const Work &work) {
  const int64_t parts = (count + grain - 1) / grain;
  if (parts <= 1 || omp_get_max_threads() == 1 || omp_in_parallel()) return work(0, count);
#pragma omp parallel for schedule(dynamic)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * grain;
    work(first, first + grain < count ? first + grain : count);
  }
}
