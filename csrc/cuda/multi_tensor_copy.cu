// Copies many strided rectangles, converting between float32, bfloat16 and float16 on the way: one launch for 400 of them.
//
// Their descriptions travel as the kernel's argument (sm_70 and later take 32,764 bytes), so nothing is uploaded and a CUDA
// graph can capture the launch. Each block owns a stretch of one rectangle; a thread has UNROLL loads of up to 32 bytes in
// flight before its first store.
#include "warp.h"

#include <algorithm>

namespace {

constexpr int MAX_ENTRIES = 400;
constexpr int THREADS = 256;
constexpr int UNROLL = 4;
constexpr int64_t ITEMS_PER_BLOCK = THREADS * UNROLL * 4;
constexpr int VECTOR = 8;  // elements that a thread converts at once: 16 bytes of the narrower type

// A row of the caller's table, all int64: kernels/rectangles.py RectanglePair, two type codes, bytes of a source element.
struct Rectangle {
  int64_t source, destination, rows, columns;
  int64_t source_row_stride, source_column_stride, destination_row_stride, destination_column_stride;
  int64_t source_type, destination_type, item_bytes;
};

enum Type : int64_t { BITS = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

// What is moved: a unit of bits, or one element or VECTOR elements through float32.
enum Kind : int32_t { BITS_1, BITS_2, BITS_4, BITS_8, BITS_16, CONVERT, CONVERT_VECTOR };

struct Entry {
  const void* source;
  void* destination;
  int64_t rows, columns;  // columns, and the strides below, count items: units, elements or vectors
  int64_t source_row_stride, source_column_stride, destination_row_stride, destination_column_stride;
  int32_t kind;
  int16_t source_type, destination_type;
};

struct Entries {
  Entry entry[MAX_ENTRIES];
  int32_t first_block[MAX_ENTRIES + 1];
  int32_t count;
};
static_assert(sizeof(Entries) <= 32764, "kernel arguments are limited to 32,764 bytes");

struct alignas(16) Bits16 {
  uint32_t word[4];
};

template <typename T>
struct Move {
  using Source = T;
  using Destination = T;
  __device__ static T convert(const T& value) { return value; }
};

template <typename From, typename To, int N>
struct Convert {
  using Source = Pack<From, N>;
  using Destination = Pack<To, N>;
  __device__ static Destination convert(const Source& in) {
    Destination out;
#pragma unroll
    for (int i = 0; i < N; ++i) from_float(to_float(in.value[i]), &out.value[i]);
    return out;
  }
};

// Items first .. first + ITEMS_PER_BLOCK of the rectangle, row by row. One division finds a thread's first item; from there
// row and column advance by constants.
template <typename Operation>
__device__ void copy_items(const Entry& entry, int64_t first) {
  const auto* source = static_cast<const typename Operation::Source*>(entry.source);
  auto* destination = static_cast<typename Operation::Destination*>(entry.destination);
  const int64_t columns = entry.columns;
  const int64_t last = min(first + ITEMS_PER_BLOCK, entry.rows * columns);
  const int64_t step_rows = THREADS / columns;
  const int64_t step_columns = THREADS % columns;
  int64_t item = first + threadIdx.x;
  int64_t row = item / columns;
  int64_t column = item - row * columns;
  while (item < last) {
    typename Operation::Source held[UNROLL];
    int64_t target[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      target[i] = -1;
      if (item < last) {
        held[i] = source[row * entry.source_row_stride + column * entry.source_column_stride];
        target[i] = row * entry.destination_row_stride + column * entry.destination_column_stride;
      }
      item += THREADS;
      row += step_rows;
      column += step_columns;
      if (column >= columns) {
        column -= columns;
        ++row;
      }
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      if (target[i] >= 0) destination[target[i]] = Operation::convert(held[i]);
    }
  }
}

template <typename From, typename To>
__device__ void convert_items(const Entry& entry, int64_t first) {
  if (entry.kind == CONVERT_VECTOR) {
    copy_items<Convert<From, To, VECTOR>>(entry, first);
  } else {
    copy_items<Convert<From, To, 1>>(entry, first);
  }
}

__global__ void __launch_bounds__(THREADS) multi_tensor_copy_kernel(const __grid_constant__ Entries entries) {
  const int32_t block = blockIdx.x;
  int32_t low = 0, high = entries.count;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (entries.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Entry& entry = entries.entry[low];
  const int64_t first = (block - entries.first_block[low]) * ITEMS_PER_BLOCK;
  switch (entry.kind) {
    case BITS_1: return copy_items<Move<uint8_t>>(entry, first);
    case BITS_2: return copy_items<Move<uint16_t>>(entry, first);
    case BITS_4: return copy_items<Move<uint32_t>>(entry, first);
    case BITS_8: return copy_items<Move<uint64_t>>(entry, first);
    case BITS_16: return copy_items<Move<Bits16>>(entry, first);
    default: break;
  }
  switch (entry.source_type * 4 + entry.destination_type) {
    case FLOAT32 * 4 + BFLOAT16: return convert_items<float, __nv_bfloat16>(entry, first);
    case FLOAT32 * 4 + FLOAT16: return convert_items<float, __half>(entry, first);
    case BFLOAT16 * 4 + FLOAT32: return convert_items<__nv_bfloat16, float>(entry, first);
    case BFLOAT16 * 4 + FLOAT16: return convert_items<__nv_bfloat16, __half>(entry, first);
    case FLOAT16 * 4 + FLOAT32: return convert_items<__half, float>(entry, first);
    default: return convert_items<__half, __nv_bfloat16>(entry, first);
  }
}

bool divides(int64_t unit, const Rectangle& r, int64_t source_bytes, int64_t destination_bytes) {
  const int64_t all = r.source | r.destination | r.source_row_stride * source_bytes |
                      r.destination_row_stride * destination_bytes;
  return all % unit == 0;  // unit is a power of two
}

// The widest way to move a rectangle; false for types that don't exist.
bool plan(const Rectangle& r, Entry* entry) {
  const bool converts = r.source_type != r.destination_type;
  const bool contiguous = r.source_column_stride == 1 && r.destination_column_stride == 1;
  const auto is_float = [](int64_t type) { return type >= FLOAT32 && type <= FLOAT16; };
  int64_t per_item = 1;  // elements in an item; a fraction never occurs
  *entry = Entry{reinterpret_cast<const void*>(r.source), reinterpret_cast<void*>(r.destination), r.rows, r.columns,
                 r.source_row_stride, r.source_column_stride, r.destination_row_stride, r.destination_column_stride,
                 CONVERT, static_cast<int16_t>(r.source_type), static_cast<int16_t>(r.destination_type)};
  if (converts) {
    if (!is_float(r.source_type) || !is_float(r.destination_type)) return false;
    const int64_t source_bytes = r.source_type == FLOAT32 ? 4 : 2, destination_bytes = r.destination_type == FLOAT32 ? 4 : 2;
    if (contiguous && r.columns % VECTOR == 0 && r.source_row_stride % VECTOR == 0 && r.destination_row_stride % VECTOR == 0 &&
        divides(16, r, source_bytes, destination_bytes)) {
      entry->kind = CONVERT_VECTOR;
      per_item = VECTOR;
    }
  } else {
    int64_t unit = r.item_bytes;
    if (unit != 1 && unit != 2 && unit != 4 && unit != 8 && unit != 16) return false;
    if (!divides(unit, r, unit, unit)) return false;  // an address that no element can have
    while (contiguous && unit < 16 && divides(2 * unit, r, r.item_bytes, r.item_bytes) &&
           r.columns * r.item_bytes % (2 * unit) == 0) {
      unit *= 2;
    }
    entry->kind = unit == 1 ? BITS_1 : unit == 2 ? BITS_2 : unit == 4 ? BITS_4 : unit == 8 ? BITS_8 : BITS_16;
    per_item = unit / r.item_bytes;
  }
  if (per_item > 1) {  // contiguous: column strides stay 1
    entry->columns /= per_item;
    entry->source_row_stride /= per_item;
    entry->destination_row_stride /= per_item;
  }
  return true;
}

}  // namespace

extern "C" int strop_cuda_multi_tensor_copy(const int64_t* table, int64_t count, void* stream) {
  static_assert(sizeof(Rectangle) == 11 * sizeof(int64_t), "a row of the table");
  const auto* rectangles = reinterpret_cast<const Rectangle*>(table);
  for (int64_t start = 0; start < count; start += MAX_ENTRIES) {
    Entries entries;
    entries.count = static_cast<int32_t>(std::min<int64_t>(count - start, MAX_ENTRIES));
    int64_t blocks = 0;
    for (int32_t i = 0; i < entries.count; ++i) {
      Entry& entry = entries.entry[i];
      if (!plan(rectangles[start + i], &entry)) return STROP_BAD_ARGUMENT;
      entries.first_block[i] = static_cast<int32_t>(blocks);
      blocks += (entry.rows * entry.columns + ITEMS_PER_BLOCK - 1) / ITEMS_PER_BLOCK;
      if (blocks > INT32_MAX) return STROP_BAD_ARGUMENT;
    }
    entries.first_block[entries.count] = static_cast<int32_t>(blocks);
    STROP_LAUNCH(multi_tensor_copy_kernel, static_cast<unsigned>(blocks), THREADS, 0, stream, entries);
    if (int status = status_of(cudaGetLastError())) return status;
  }
  return STROP_OK;
}
