// How work is cut up: pieces of a range, and scratch memory for a worker.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

namespace padst {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

struct Range {
  int64_t begin, end;

  int64_t size() const {
    return end - begin;
  }
};

// The size of equal pieces of at most `target`, their number a multiple of `threads` where there are several.
inline int64_t balanced_tile(int64_t total, int64_t target, int64_t threads) {
  int64_t pieces = ceil_div(total, target);
  if (pieces > 1) {
    pieces = round_up(pieces, threads);
  }
  return std::max<int64_t>(1, ceil_div(total, std::max<int64_t>(1, pieces)));
}

// The same, of whole multiples of `step` where that takes as many pieces.
inline int64_t balanced_tile(int64_t total, int64_t target, int64_t threads, int64_t step) {
  const int64_t tile = balanced_tile(total, target, threads), whole = round_up(tile, step);
  return ceil_div(total, whole) == ceil_div(total, tile) ? whole : tile;
}

inline constexpr int64_t kCacheLine = 64;

// The distance of rows of float: a line off the power of two at which rows would share cache sets, and stores to one would look like
// loads from another.
inline int64_t padded_stride(int64_t features) {
  constexpr int64_t kLine = kCacheLine / sizeof(float);
  return round_up(features, kLine) + kLine;
}

// Uninitialised memory that starts on a cache line.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(1, count) * sizeof(T), std::align_val_t{kCacheLine}))) {}
  ~Scratch() {
    ::operator delete(data_, std::align_val_t{kCacheLine});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const {
    return data_;
  }

 private:
  T* data_;
};

}  // namespace padst
