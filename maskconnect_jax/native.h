// What the code that a CPU compiles for itself has in common.

#ifndef MASKCONNECT_JAX_NATIVE_H_
#define MASKCONNECT_JAX_NATIVE_H_

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace maskconnect {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // floats in a register
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));

inline Vector Load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void Store(float* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

}  // namespace maskconnect

#endif  // MASKCONNECT_JAX_NATIVE_H_
