// The functions and types of CUDA C++ that kernels use, on top of cuda_emulation.h. Add here what a kernel needs.
#pragma once

#define threadIdx (emulation::machine.current->index)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block)
#define gridDim (emulation::machine.grid)
constexpr int warpSize = 32;

// Barriers and votes.
inline void __syncthreads() { emulation::wait(emulation::State::waits_for_block); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulation::wait(emulation::State::waits_for_warp, mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __syncthreads_count(int predicate) {
  int present;
  return emulation::count_in_block(predicate, &present);
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline int __syncthreads_and(int predicate) {
  int present;
  return emulation::count_in_block(predicate, &present) == present;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = unsigned(predicate != 0) << emulation::machine.current->lane;
  return emulation::reduce(mask, bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Shuffles. Groups of `width` lanes; a source outside the group is the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulation::machine.current->lane;
  return emulation::exchange(mask, value, [&](auto read) { return read((lane & ~(width - 1)) + (source & (width - 1))); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = emulation::machine.current->lane, source = lane ^ lane_mask;
  return emulation::exchange(mask, value, [&](auto read) { return read(source / width > lane / width ? lane : source); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulation::machine.current->lane, source = lane + int(delta);
  return emulation::exchange(mask, value, [&](auto read) { return read(source / width != lane / width ? lane : source); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulation::machine.current->lane, source = lane - int(delta);
  return emulation::exchange(mask, value, [&](auto read) { return read(source < (lane & ~(width - 1)) ? lane : source); });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, [](T a, T b) { return T(a + b); });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, [](T a, T b) { return max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, [](T a, T b) { return min(a, b); });
}

// Atomics: one thread runs at a time. Each returns the old value.
template <typename T, typename Update>
T emulated_atomic(T* address, Update update) {
  const T old = *address;
  *address = update(old);
  return old;
}
template <typename T>
struct same {  // keeps an argument out of template deduction
  using type = T;
};
template <typename T>
T atomicAdd(T* address, typename same<T>::type value) {
  return emulated_atomic(address, [&](T old) { return T(old + value); });
}
template <typename T>
T atomicMax(T* address, typename same<T>::type value) {
  return emulated_atomic(address, [&](T old) { return max(old, value); });
}
template <typename T>
T atomicMin(T* address, typename same<T>::type value) {
  return emulated_atomic(address, [&](T old) { return min(old, value); });
}
template <typename T>
T atomicOr(T* address, typename same<T>::type value) {
  return emulated_atomic(address, [&](T old) { return T(old | value); });
}
template <typename T>
T atomicExch(T* address, typename same<T>::type value) {
  return emulated_atomic(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, typename same<T>::type compare, typename same<T>::type value) {
  return emulated_atomic(address, [&](T old) { return old == compare ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulated_atomic(address, [&](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// Vectors, with CUDA's alignments.
#define STROP_VECTOR2(name, type, bytes)  \
  struct alignas(bytes) name {            \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }
#define STROP_VECTOR4(name, type, bytes)  \
  struct alignas(bytes) name {            \
    type x, y, z, w;                      \
  };                                      \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
STROP_VECTOR2(float2, float, 8)
STROP_VECTOR2(int2, int, 8)
STROP_VECTOR2(uint2, unsigned, 8)
STROP_VECTOR2(longlong2, long long, 16)
STROP_VECTOR4(float4, float, 16)
STROP_VECTOR4(int4, int, 16)
STROP_VECTOR4(uint4, unsigned, 16)
STROP_VECTOR4(uchar4, unsigned char, 4)

template <typename T>
T __ldg(const T* address) { return *address; }
template <typename T>
T __ldcs(const T* address) { return *address; }
template <typename T>
T __ldcg(const T* address) { return *address; }
template <typename T>
void __stcs(T* address, T value) { *address = value; }
template <typename T>
void __stcg(T* address, T value) { *address = value; }

// Bits and arithmetic. The approximations of the device are exact here.
template <typename To, typename From>
To emulated_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
inline int __float_as_int(float value) { return emulated_bits<int>(value); }
inline unsigned __float_as_uint(float value) { return emulated_bits<unsigned>(value); }
inline float __int_as_float(int value) { return emulated_bits<float>(value); }
inline float __uint_as_float(unsigned value) { return emulated_bits<float>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __log2f(float value) { return std::log2(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float strop_exp2(float value) { return std::exp2(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

// 16-bit floats.
struct __half {
  _Float16 value;
  __half() = default;
  __half(float f) : value(static_cast<_Float16>(f)) {}
  operator float() const { return static_cast<float>(value); }
};
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float f) {
    const uint32_t wide = __float_as_uint(f);
    bits = f != f ? 0x7FFF : static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
  operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half = __half;
using nv_bfloat16 = __nv_bfloat16;
inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {value.x, value.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }

// The part of the runtime that launchers call.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
