// A convolution on a CPU, and the gradient of its kernel, as XLA FFI calls.
//
// `convolution.py` says when they are taken, and `run/native.py` compiles them
// for the CPU of this machine. Both are sums of products of a vector of output
// channels with one number of the input. The sums of a tile of pixels (or of
// kernel weights) stay in registers until they are complete. A 3x3 convolution
// at stride 1 takes 16 such products for four pixels, by Winograd's transforms.
// What is added in which order depends neither on threads nor on the width of a
// register.
//
// A batch is split over devices, one for each core, and there each call takes
// one thread. With a single device a call takes all threads.
//
// Layouts: x [N, H, W, C], kernel [k, k, C / groups, C'], y [N, H', W', C'].
// C' / groups is a multiple of 16. Zeros surround the image.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "native.h"

namespace {

using namespace maskconnect;

// Sums at once: as many as registers hold beside their operands.
constexpr int kTile = kLanes == 4 ? 8 : kLanes == 8 ? 12 : 16;

struct Shape {
  int64_t images, height, width, channels;  // of x
  int64_t rows, columns, outputs;           // of y
  int64_t size, inputs;                     // of the kernel: k, C / groups
  int64_t stride, pad, padded_width;
  // The weights of a kernel's row lie side by side, and without groups so do
  // the numbers of x that they meet: one run of k C. With groups: k runs.
  int64_t runs, length;

  Shape(ffi::Span<const int64_t> x, ffi::Span<const int64_t> kernel,
        ffi::Span<const int64_t> y, int64_t stride)
      : images(x[0]), height(x[1]), width(x[2]), channels(x[3]),
        rows(y[1]), columns(y[2]), outputs(y[3]),
        size(kernel[0]), inputs(kernel[2]),
        stride(stride), pad(size / 2), padded_width(width + 2 * pad),
        runs(inputs == channels ? 1 : size),
        length(inputs == channels ? size * inputs : inputs) {}

  // Products in y, and so in a gradient.
  int64_t work() const {
    return images * rows * columns * outputs * size * size * inputs;
  }
  int64_t per_group() const { return outputs * inputs / channels; }
  // Where the group of an output begins in a pixel.
  int64_t group(int64_t output) const { return output / per_group() * inputs; }
  // Where in x, padded, a pixel of y begins to read, and its i-th row.
  int64_t at(int64_t row, int64_t column) const {
    return (row * padded_width + column) * channels;
  }
};

// What a thread's memory is for. Each thread keeps it from call to call, as to
// get it anew took a tenth of the time of one image. It holds what was there.
enum class Use { kPadded, kKernel, kPoints, kProducts };

template <Use use>
float* Memory(int64_t size) {
  thread_local std::vector<float> data;
  if (static_cast<int64_t>(data.size()) < size) data.resize(size);
  return data.data();
}

// Holds one image of x, with a border of zeros.
class Padded {
 public:
  explicit Padded(const Shape& s) : shape_(s) {
    // One row more: the last of Winograd's tiles may reach into it.
    const int64_t size =
        (s.height + 2 * s.pad + 1) * s.padded_width * s.channels;
    data_ = Memory<Use::kPadded>(size);
    std::fill_n(data_, size, 0.0f);
  }

  const float* Image(const float* x, int64_t image) {
    const int64_t row = shape_.width * shape_.channels;
    x += image * shape_.height * row;
    for (int64_t h = 0; h < shape_.height; ++h)
      std::copy_n(x + h * row, row,
                  data_ + shape_.at(h + shape_.pad, shape_.pad));
    return data_;
  }

 private:
  const Shape& shape_;
  float* data_;
};

// y of T pixels of a row and V vectors of outputs: sum of kernel times x.
template <int V, int T>
inline void Tile(const Shape& s, const float* x, const float* kernel,
                 float* y) {
  Vector sums[T][V] = {};
  for (int64_t i = 0; i < s.size; ++i)
    for (int64_t run = 0; run < s.runs; ++run) {
      const float* from = x + s.at(i, run);
      for (int64_t n = 0; n < s.length; ++n, kernel += s.outputs) {
        Vector weights[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) weights[v] = Load(kernel + v * kLanes);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v)
            sums[t][v] += weights[v] * from[t * s.stride * s.channels + n];
      }
    }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      Store(y + t * s.outputs + v * kLanes, sums[t][v]);
}

// The pixels of a row from `column` on, T at a time, the rest in smaller tiles.
template <int V, int T>
inline void Row(const Shape& s, const float* x, const float* kernel, float* y,
                int64_t column) {
  for (; column + T <= s.columns; column += T)
    Tile<V, T>(s, x + s.at(0, column * s.stride), kernel,
               y + column * s.outputs);
  if constexpr (T > 1) Row<V, T - 1>(s, x, kernel, y, column);
}

// The rows of an image from `begin` on, before `end`.
template <int V>
void Rows(const Shape& s, const float* x, const float* kernel, float* y,
          int64_t begin, int64_t end) {
  for (int64_t output = 0; output < s.outputs; output += V * kLanes)
    for (int64_t row = begin; row < end; ++row)
      Row<V, kTile / V>(s, x + s.at(row * s.stride, 0) + s.group(output),
                        kernel + output,
                        y + row * s.columns * s.outputs + output, 0);
}

// A 3x3 convolution at stride 1 in 16 products instead of 36 for each 2x2 tile
// of y: Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv:1509.09308),
//
//   y = A^T [(G kernel G^T) * (B^T x B)] A,
//
// where * is a product over the channels at each of 16 points, for many tiles.
class Winograd {
 public:
  // Without groups, and with a kernel that is sooner transformed than applied
  // to one image; whatever the registers, so that all CPUs take the same sums.
  static bool Fits(const Shape& s) {
    return s.size == 3 && s.stride == 1 && s.inputs == s.channels &&
           s.inputs % 16 == 0 && s.inputs * s.outputs <= 256 * 256;
  }

  Winograd(const Shape& s, const float* kernel)
      : s_(s), across_((s.columns + 1) / 2),
        kernel_(Memory<Use::kKernel>(16 * s.inputs * s.outputs)) {
    for (int64_t i = 0; i < s.inputs * s.outputs; i += kLanes) {
      Vector g[4][4];
      for (int row = 0; row < 3; ++row)
        for (int column = 0; column < 3; ++column)
          g[row][column] =
              Load(kernel + (row * 3 + column) * s.inputs * s.outputs + i);
      for (int k = 0; k < 3; ++k) Kernel(g[0][k], g[1][k], g[2][k], g[3][k]);
      for (auto& row : g) Kernel(row[0], row[1], row[2], row[3]);
      Scatter(g, kernel_ + i, s.inputs * s.outputs);
    }
  }

  int64_t down() const { return (s_.rows + 1) / 2; }

  // The rows of tiles from `begin` on, before `end`; x is padded.
  void Rows(const float* x, float* y, int64_t begin, int64_t end) const {
    const int64_t most = std::max<int64_t>(1, kTile / across_);
    auto* points = Memory<Use::kPoints>(16 * Step(most * across_, s_.inputs));
    auto* products =
        Memory<Use::kProducts>(16 * Step(most * across_, s_.outputs));
    for (int64_t row = begin; row < end; row += most) {
      const int64_t tiles = std::min(most, end - row) * across_;
      Split(x, row, tiles, points);
      const int64_t from[] = {1, 1, tiles, s_.inputs};
      const int64_t to[] = {1, 1, tiles, s_.outputs};
      const int64_t matrix[] = {1, 1, s_.inputs, s_.outputs};
      const Shape point({from, 4}, {matrix, 4}, {to, 4}, 1);
      auto* multiply = s_.outputs % (2 * kLanes) ? ::Rows<1> : ::Rows<2>;
      for (int64_t p = 0; p < 16; ++p)
        multiply(point, points + p * Step(tiles, s_.inputs),
                 kernel_ + p * s_.inputs * s_.outputs,
                 products + p * Step(tiles, s_.outputs), 0, 1);
      Join(products, row, tiles, y);
    }
  }

 private:
  // From a point to the next; no power of two, or they would share few lines
  // of the first cache.
  static int64_t Step(int64_t tiles, int64_t channels) {
    return tiles * channels + kLanes;
  }

  // G times a column; d is undefined before.
  static void Kernel(Vector& a, Vector& b, Vector& c, Vector& d) {
    const Vector even = (a + c) * 0.5f, odd = b * 0.5f;
    d = c, b = even + odd, c = even - odd;
  }

  // B^T times a column.
  static void Input(Vector& a, Vector& b, Vector& c, Vector& d) {
    const Vector first = a - c, last = b - d, sum = b + c, gap = c - b;
    a = first, b = sum, c = gap, d = last;
  }

  static void Scatter(const Vector (&values)[4][4], float* to, int64_t step) {
    for (int p = 0; p < 16; ++p) Store(to + p * step, values[p / 4][p % 4]);
  }

  // B^T x B of each tile: 16 times [tiles, inputs].
  void Split(const float* x, int64_t row, int64_t tiles, float* to) const {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float* from =
          x + s_.at(2 * (row + tile / across_), 2 * (tile % across_));
      for (int64_t c = 0; c < s_.inputs; c += kLanes) {
        Vector d[4][4];
        for (int p = 0; p < 16; ++p)
          d[p / 4][p % 4] = Load(from + s_.at(p / 4, p % 4) + c);
        for (int k = 0; k < 4; ++k) Input(d[0][k], d[1][k], d[2][k], d[3][k]);
        for (auto& line : d) Input(line[0], line[1], line[2], line[3]);
        Scatter(d, to + tile * s_.inputs + c, Step(tiles, s_.inputs));
      }
    }
  }

  // A^T m A of each tile, where it lies inside y.
  void Join(const float* m, int64_t row, int64_t tiles, float* y) const {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t top = 2 * (row + tile / across_);
      const int64_t left = 2 * (tile % across_);
      for (int64_t c = 0; c < s_.outputs; c += kLanes) {
        Vector half[2][4];
        for (int k = 0; k < 4; ++k) {
          Vector own[4];
          for (int i = 0; i < 4; ++i)
            own[i] = Load(m + (i * 4 + k) * Step(tiles, s_.outputs) +
                          tile * s_.outputs + c);
          half[0][k] = own[0] + own[1] + own[2];
          half[1][k] = own[1] - own[2] - own[3];
        }
        for (int i = 0; i < 2; ++i) {
          if (top + i >= s_.rows) break;
          float* to = y + ((top + i) * s_.columns + left) * s_.outputs + c;
          const auto& h = half[i];
          Store(to, h[0] + h[1] + h[2]);
          if (left + 1 < s_.columns) Store(to + s_.outputs, h[1] - h[2] - h[3]);
        }
      }
    }
  }

  const Shape& s_;
  const int64_t across_;  // tiles in a row
  float* kernel_;
};

// Adds to B weights of V vectors of outputs: sum over the pixels of x times dy.
template <int V, int B>
inline void Weights(const Shape& s, const float* x, const float* dy,
                    float* gradient) {
  Vector sums[B][V] = {};
  for (int64_t row = 0; row < s.rows; ++row) {
    const float* from = x + s.at(row * s.stride, 0);
    for (int64_t column = 0; column < s.columns;
         ++column, from += s.stride * s.channels, dy += s.outputs) {
      Vector slopes[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) slopes[v] = Load(dy + v * kLanes);
#pragma GCC unroll 16
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[b][v] += slopes[v] * from[b];
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < B; ++b)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = gradient + b * s.outputs + v * kLanes;
      Store(to, Load(to) + sums[b][v]);
    }
}

// Adds to `count` weights, at most B.
template <int V, int B>
inline void Block(const Shape& s, const float* x, const float* dy,
                  float* gradient, int64_t count) {
  if (count == B) return Weights<V, B>(s, x, dy, gradient);
  if constexpr (B > 1) Block<V, B - 1>(s, x, dy, gradient, count);
}

// The blocks of a gradient: weights of a run and V vectors of their outputs.
template <int V>
class Blocks {
 public:
  explicit Blocks(const Shape& s)
      : s_(s), across_(s.outputs / (V * kLanes)),
        along_((s.length + kMost - 1) / kMost) {}

  int64_t count() const { return s_.size * s_.runs * along_ * across_; }

  // Adds an image, padded, to the blocks from `begin` on, before `end`.
  void Add(const float* x, const float* dy, float* gradient, int64_t begin,
           int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t n = block % along_ * kMost;
      const int64_t output = block / along_ % across_ * V * kLanes;
      const int64_t run = block / along_ / across_;
      Block<V, kMost>(
          s_, x + s_.at(run / s_.runs, run % s_.runs) + s_.group(output) + n,
          dy + output, gradient + (run * s_.length + n) * s_.outputs + output,
          std::min<int64_t>(kMost, s_.length - n));
    }
  }

 private:
  static constexpr int kMost = kTile / V;  // weights of a block

  const Shape& s_;
  const int64_t across_, along_;
};

// A part of less takes no longer than to wake a thread for it, 50 us.
constexpr int64_t kWorth = 4'000'000;

// Calls run(begin, end) for up to `most` parts of 0 to `count`, on the threads
// of the pool that are free. Nobody waits for a part that no thread has begun.
template <typename F>
void InParts(ffi::ThreadPool& pool, int64_t most, int64_t count, const F& run) {
  const int64_t parts =
      std::max<int64_t>(1, std::min({most, count, pool.num_threads()}));
  struct Progress {
    std::atomic<int64_t> begun{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, parts, count, &run] {
    for (int64_t part; (part = progress->begun++) < parts; ++progress->done)
      run(count * part / parts, count * (part + 1) / parts);
  };
  for (int64_t other = 1; other < parts; ++other)
    pool.Schedule([work] { work(); });
  work();
  while (progress->done < parts) std::this_thread::yield();
}

ffi::Error Conv(ffi::ThreadPool pool, Floats x, Floats kernel, Result y,
                int64_t stride, bool threads) {
  const Shape s(x.dimensions(), kernel.dimensions(), y->dimensions(), stride);
  const int64_t parts = threads ? s.work() / kWorth : 1;
  const auto in_parts = [&](int64_t count, const auto& rows) {
    const int64_t size = s.rows * s.columns * s.outputs;
    if (s.images == 1) {
      Padded padded(s);
      const float* from = padded.Image(x.typed_data(), 0);
      InParts(pool, parts, count, [&](int64_t begin, int64_t end) {
        rows(from, y->typed_data(), begin, end);
      });
    } else {
      InParts(pool, parts, s.images, [&](int64_t begin, int64_t end) {
        Padded padded(s);
        for (int64_t n = begin; n < end; ++n)
          rows(padded.Image(x.typed_data(), n), y->typed_data() + n * size, 0,
               count);
      });
    }
  };
  if (Winograd::Fits(s)) {
    const Winograd winograd(s, kernel.typed_data());
    in_parts(winograd.down(), [&](auto... given) { winograd.Rows(given...); });
  } else {
    auto* rows = s.per_group() % (2 * kLanes) ? Rows<1> : Rows<2>;
    in_parts(s.rows, [&](const float* from, float* to, int64_t begin,
                         int64_t end) {
      rows(s, from, kernel.typed_data(), to, begin, end);
    });
  }
  return ffi::Error::Success();
}

template <int V>
void AddImages(ffi::ThreadPool& pool, int64_t parts, const Shape& s,
               const float* x, const float* dy, float* gradient) {
  const Blocks<V> blocks(s);
  InParts(pool, parts, blocks.count(), [&](int64_t begin, int64_t end) {
    Padded padded(s);
    for (int64_t n = 0; n < s.images; ++n)
      blocks.Add(padded.Image(x, n), dy + n * s.rows * s.columns * s.outputs,
                 gradient, begin, end);
  });
}

ffi::Error KernelGradient(ffi::ThreadPool pool, Floats x, Floats dy,
                          Result gradient, int64_t stride, bool threads) {
  const Shape s(x.dimensions(), gradient->dimensions(), dy.dimensions(),
                stride);
  auto* add = s.per_group() % (2 * kLanes) ? AddImages<1> : AddImages<2>;
  std::fill_n(gradient->typed_data(), gradient->element_count(), 0.0f);
  add(pool, threads ? s.work() / kWorth : 1, s, x.typed_data(),
      dy.typed_data(), gradient->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(maskconnect_conv, Conv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("stride")
                                  .Attr<bool>("threads"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(maskconnect_conv_kernel_gradient, KernelGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("stride")
                                  .Attr<bool>("threads"));
