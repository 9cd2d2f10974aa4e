// The masked sum on a CPU, and the gradients of a source, as XLA FFI calls.
//
// `aggregate.py` has the equations. A term whose weight is 0 is not read for a
// sum. A chunk of an image stays in the first cache while all terms are added
// to it, or multiplied with it. What is added in which order depends neither
// on threads nor on the width of a register. Each call takes one thread.
//
// Layouts: weights [n, batch]; source, sum and each of n terms [batch, ...].

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../native.h"

namespace {

using namespace maskconnect;

constexpr int64_t kChunk = 2048;  // floats
constexpr int kSums = 64;         // of a product, side by side

// Where an image of each term begins.
class Terms {
 public:
  Terms(const ffi::RemainingArgs& terms, int64_t size) : size_(size) {
    for (size_t i = 0; i < terms.size(); ++i)
      begins_.push_back(terms.get<Floats>(i)->typed_data());
  }

  int64_t count() const { return begins_.size(); }
  const float* Image(int64_t term, int64_t image) const {
    return begins_[term] + image * size_;
  }

 private:
  int64_t size_;
  std::vector<const float*> begins_;
};

inline void Add(float weight, const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += weight * from[i];
}

// Adds the products of x and y to `sums`, and if kAdd weight * x to `to`.
template <bool kAdd>
inline void Multiply(const float* x, const float* y, float* sums, float weight,
                     float* to, int64_t count) {
  constexpr int kVectors = kSums / kLanes;
  Vector own[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) own[v] = Load(sums + v * kLanes);
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kLanes;
      const Vector value = Load(x + at);
      own[v] += value * Load(y + at);
      if constexpr (kAdd) Store(to + at, Load(to + at) + weight * value);
    }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) Store(sums + v * kLanes, own[v]);
  for (int64_t rest = i; rest < count; ++rest) {
    sums[rest - i] += x[rest] * y[rest];
    if constexpr (kAdd) to[rest] += weight * x[rest];
  }
}

ffi::Error MaskedSum(Floats weights, ffi::RemainingArgs given, Result total) {
  const int64_t images = weights.dimensions()[1];
  const int64_t size = total->element_count() / std::max<int64_t>(images, 1);
  const Terms terms(given, size);
  for (int64_t image = 0; image < images; ++image) {
    float* out = total->typed_data() + image * size;
    for (int64_t at = 0; at < size; at += kChunk) {
      const int64_t count = std::min(kChunk, size - at);
      std::fill_n(out + at, count, 0.0f);
      for (int64_t i = 0; i < terms.count(); ++i)
        if (const float weight = weights.typed_data()[i * images + image])
          Add(weight, terms.Image(i, image) + at, out + at, count);
    }
  }
  return ffi::Error::Success();
}

ffi::Error SourceGradients(Floats weights, Floats source,
                           ffi::RemainingArgs given, Result gradient,
                           Result products) {
  const int64_t images = weights.dimensions()[1];
  const int64_t size = source.element_count() / std::max<int64_t>(images, 1);
  const Terms terms(given, size);
  std::vector<float> sums(terms.count() * kSums);
  for (int64_t image = 0; image < images; ++image) {
    const float* y = source.typed_data() + image * size;
    float* out = gradient->typed_data() + image * size;
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t at = 0; at < size; at += kChunk) {
      const int64_t count = std::min(kChunk, size - at);
      std::fill_n(out + at, count, 0.0f);
      for (int64_t i = 0; i < terms.count(); ++i) {
        const float weight = weights.typed_data()[i * images + image];
        auto* multiply = weight ? Multiply<true> : Multiply<false>;
        multiply(terms.Image(i, image) + at, y + at, &sums[i * kSums], weight,
                 out + at, count);
      }
    }
    for (int64_t i = 0; i < terms.count(); ++i) {
      float product = 0;
      for (int s = 0; s < kSums; ++s) product += sums[i * kSums + s];
      products->typed_data()[i * images + image] = product;
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(maskconnect_masked_sum, MaskedSum,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(maskconnect_source_gradients, SourceGradients,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
