// Runs .cu files on the CPU: g++ -x c++ -DSTROP_EMULATION -I tests/kernels/emulation kernel.cu. Included by csrc/cuda/launch.h.
//
// The threads of a block are fibers, run one after the other, each until its next barrier; warp shuffles are barriers of the
// lanes in their mask. Blocks run one after the other. So it checks arithmetic, indexing, alignment of vector accesses (with
// -fsanitize=alignment) and barriers that some threads never reach. It shows no memory ordering and no race as such, but with
// strop_emulation_order(1) threads and blocks run backwards, and a result that then differs had one.
//
// Not emulated: tensor cores, TMA, clusters, cooperative grids, blocks that wait for other blocks. __shared__ variables are
// static: they keep what the block before left, where CUDA's are undefined.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __shared__ static
#define __align__(bytes) alignas(bytes)
#define STROP_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulation::dynamic_shared())
#define STROP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulation::launch((grid), (block), (shared_bytes), [=] { kernel(__VA_ARGS__); })

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 256 * 1024;

enum class State { runs, waits_for_block, waits_for_warp, done };

// A fiber's first step is setcontext; from then on it is left and resumed with _setjmp and _longjmp, as swapcontext costs two
// system calls a switch. (Compiled with -U_FORTIFY_SOURCE, whose longjmp takes another stack for an error.)
struct Fiber {
  ucontext_t start;
  jmp_buf position;
  bool started;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  State state;
  uint3 index;
  unsigned lane;
  unsigned warp;
  unsigned mask;  // the lanes it waits for
};

struct Slot {
  alignas(16) unsigned char bytes[16];
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // reused by later blocks
  unsigned num_threads = 0;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  dim3 grid, block;
  uint3 block_index;
  std::vector<Slot> slots;  // one a thread: what shuffles and votes exchange
  std::unique_ptr<Slot[]> shared;
  bool backwards = false;
};

inline Machine machine;

inline unsigned char* dynamic_shared() { return machine.shared[0].bytes; }

[[noreturn]] inline void fail(const char* what) {
  const Fiber* f = machine.current;
  std::fprintf(stderr, "emulated kernel, block (%u, %u, %u)", machine.block_index.x, machine.block_index.y, machine.block_index.z);
  if (f) std::fprintf(stderr, " thread (%u, %u, %u)", f->index.x, f->index.y, f->index.z);
  std::fprintf(stderr, ": %s\n", what);
  std::abort();
}

inline void wait(State state, unsigned mask = 0) {
  Fiber* self = machine.current;
  self->state = state;
  self->mask = mask;
  if (_setjmp(self->position) == 0) _longjmp(machine.scheduler, 1);
}

inline void fiber_main() {
  (*machine.kernel)();
  machine.current->state = State::done;
  _longjmp(machine.scheduler, 1);
}

// Until the fiber waits or ends.
inline void run(Fiber& fiber) {
  machine.current = &fiber;
  if (_setjmp(machine.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.position, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  machine.current = nullptr;
}

// The threads whose barrier is complete go on. A thread that returned counts as having arrived, as on Volta and later.
inline bool release_barriers() {
  bool released = false, all_at_block_barrier = true;
  for (unsigned i = 0; i < machine.num_threads; ++i) {
    const State state = machine.fibers[i]->state;
    all_at_block_barrier &= state == State::waits_for_block || state == State::done;
  }
  for (unsigned i = 0; i < machine.num_threads; ++i) {
    Fiber& f = *machine.fibers[i];
    if (f.state == State::waits_for_block && all_at_block_barrier) {
      f.state = State::runs;
      released = true;
    }
    if (f.state != State::waits_for_warp) continue;
    const unsigned first = f.warp * WARP, last = min(first + WARP, machine.num_threads);
    bool complete = true;
    for (unsigned j = first; j < last; ++j) {
      const Fiber& other = *machine.fibers[j];
      if (!(f.mask >> other.lane & 1) || other.state == State::done) continue;
      complete &= other.state == State::waits_for_warp && other.mask == f.mask;
    }
    if (!complete) continue;
    for (unsigned j = first; j < last; ++j) {
      Fiber& other = *machine.fibers[j];
      if (f.mask >> other.lane & 1 && other.state == State::waits_for_warp) other.state = State::runs;
    }
    released = true;
  }
  return released;
}

inline void run_block() {
  for (unsigned i = 0; i < machine.num_threads; ++i) {
    Fiber& f = *machine.fibers[i];
    f.index = {i % machine.block.x, i / machine.block.x % machine.block.y, i / (machine.block.x * machine.block.y)};
    f.lane = i % WARP;
    f.warp = i / WARP;
    f.state = State::runs;
    f.started = false;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = STACK_BYTES;
    f.start.uc_link = nullptr;
    makecontext(&f.start, fiber_main, 0);
  }
  while (true) {
    bool all_done = true;
    for (unsigned i = 0; i < machine.num_threads; ++i) {
      Fiber& f = *machine.fibers[machine.backwards ? machine.num_threads - 1 - i : i];
      if (f.state == State::runs) run(f);
      all_done &= f.state == State::done;
    }
    if (all_done) return;
    if (!release_barriers()) fail("dead-lock: some threads wait at a barrier that others don't reach");
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  machine.grid = grid;
  machine.block = block;
  machine.num_threads = block.x * block.y * block.z;
  if (machine.num_threads == 0 || machine.num_threads > 1024) fail("a block has 1 to 1024 threads");
  if (shared_bytes > 232448) fail("a block has at most 232,448 bytes of shared memory");
  while (machine.fibers.size() < machine.num_threads) machine.fibers.push_back(std::make_unique<Fiber>());
  machine.slots.resize(machine.num_threads);
  machine.shared.reset(new Slot[shared_bytes / sizeof(Slot) + 1]);
  machine.kernel = &kernel;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = machine.backwards ? blocks - 1 - i : i;
    machine.block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (uint64_t(grid.x) * grid.y))};
    std::memset(machine.shared[0].bytes, 0xFF, shared_bytes);  // NaN: undefined, as on the device
    run_block();
  }
}

// Every lane of `mask` gives a value; each then reads from the slots of its warp.
template <typename T, typename Read>
auto exchange(unsigned mask, T value, Read read) {
  static_assert(sizeof(T) <= sizeof(Slot));
  const Fiber* self = machine.current;
  if (!(mask >> self->lane & 1)) fail("a warp function whose mask leaves out the calling lane");
  Slot* warp = &machine.slots[self->warp * WARP];
  std::memcpy(warp[self->lane].bytes, &value, sizeof(T));
  wait(State::waits_for_warp, mask);
  const auto result = read([&](unsigned lane) {
    if (self->warp * WARP + lane >= machine.num_threads || !(mask >> lane & 1)) fail("a shuffle reads a lane outside its mask");
    T other;
    std::memcpy(&other, warp[lane].bytes, sizeof(T));
    return other;
  });
  wait(State::waits_for_warp, mask);  // nobody overwrites a slot before all have read
  return result;
}

template <typename T, typename Combine>
T reduce(unsigned mask, T value, Combine combine) {
  return exchange(mask, value, [&](auto lane_value) {
    T total{};
    bool first = true;
    for (unsigned lane = 0; lane < WARP; ++lane) {
      if (!(mask >> lane & 1)) continue;
      total = first ? lane_value(lane) : combine(total, lane_value(lane));
      first = false;
    }
    return total;
  });
}

// How many threads of the block, those that returned aside, gave a predicate that holds.
inline int count_in_block(int predicate, int* present) {
  const Fiber* self = machine.current;
  const unsigned own = self->warp * WARP + self->lane;
  std::memcpy(machine.slots[own].bytes, &predicate, sizeof predicate);
  wait(State::waits_for_block);
  int count = 0;
  *present = 0;
  for (unsigned i = 0; i < machine.num_threads; ++i) {
    int given;
    std::memcpy(&given, machine.slots[i].bytes, sizeof given);
    const bool here = machine.fibers[i]->state != State::done;
    *present += here;
    count += here && given;
  }
  wait(State::waits_for_block);
  return count;
}

}  // namespace emulation

// 1 runs threads and blocks in the opposite order.
extern "C" __attribute__((visibility("default"), weak)) void strop_emulation_order(int backwards) {
  emulation::machine.backwards = backwards != 0;
}

#include "cuda_language.h"
