// The masked sum on a CPU, and the gradients of a source, as XLA FFI calls.
//
// `aggregate.py` has the equations. A term whose weight is 0 is not read for a
// sum. A chunk of an image stays in the first cache while all terms are added
// to it, or multiplied with it. What is added in which order depends neither
// on threads nor on the width of a register. Each call takes one thread.
//
// Layouts: weights [n, batch]; source, sum and each of n terms [batch, ..., C].
// A term of a sum may have fewer channels; it is added to the first ones.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../native.h"

namespace {

using namespace maskconnect;

constexpr int64_t kChunk = 2048;  // floats
constexpr int kSums = 64;         // of a product, side by side

// Where each term begins, and how many channels it has.
class Terms {
 public:
  explicit Terms(const ffi::RemainingArgs& terms) {
    for (size_t i = 0; i < terms.size(); ++i)
      terms_.push_back(*terms.get<Floats>(i));
  }

  int64_t count() const { return terms_.size(); }
  const float* begin(int64_t i) const { return terms_[i].typed_data(); }
  int64_t channels(int64_t i) const { return terms_[i].dimensions().back(); }

 private:
  std::vector<Floats> terms_;
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
  const Terms terms(given);
  const int64_t images = weights.dimensions()[1];
  const int64_t channels = total->dimensions().back();
  const int64_t pixels = total->element_count() / (images * channels);
  const int64_t step = std::max<int64_t>(1, kChunk / channels);
  for (int64_t image = 0; image < images; ++image)
    for (int64_t first = 0; first < pixels; first += step) {
      const int64_t count = std::min(step, pixels - first);
      const int64_t at = image * pixels + first;
      float* to = total->typed_data() + at * channels;
      std::fill_n(to, count * channels, 0.0f);
      for (int64_t i = 0; i < terms.count(); ++i) {
        const float weight = weights.typed_data()[i * images + image];
        if (weight == 0) continue;
        const int64_t own = terms.channels(i);
        const float* from = terms.begin(i) + at * own;
        if (own == channels)
          Add(weight, from, to, count * channels);
        else
          for (int64_t pixel = 0; pixel < count; ++pixel)
            Add(weight, from + pixel * own, to + pixel * channels, own);
      }
    }
  return ffi::Error::Success();
}

ffi::Error SourceGradients(Floats weights, Floats source,
                           ffi::RemainingArgs given, Result gradient,
                           Result products) {
  const int64_t images = weights.dimensions()[1];
  const int64_t size = source.element_count() / images;
  const Terms terms(given);
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
        multiply(terms.begin(i) + image * size + at, y + at, &sums[i * kSums],
                 weight, out + at, count);
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
