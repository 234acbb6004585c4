// Batch moments and batch norm on a GPU. x is (M, C), whose channels are columns, or (N, C, L), whose channels are
// planes. A block processes one split of a channel or of a tile of columns. Sums run in fp32 over the vectors that a
// thread loads at once, and in fp64 across them. A second kernel merges the splits in a fixed order. There are no
// atomics, so results are deterministic.
#pragma once

#include "batch_moments.cuh"

namespace sslkern::cuda {

// The parameters of a normalisation: (C,) in the accumulator's type; centre is (2, C).
template <class A>
struct Statistics {
  const A *weight, *bias, *centre, *variance;
  A eps;
  bool relu;
};

// The map of a channel: y = (x - mean) * scale + bias. The bias corrects for the low part of the mean.
template <class A>
struct Affine {
  A mean, scale, bias;

  __device__ A y(A x) const {
    return (x - mean) * scale + bias;
  }
};

template <class A>
__device__ A inverse_std(const Statistics<A>& f, int64_t channel) {
  return A(1) / sqrt(f.variance[channel] + f.eps);
}

template <class A>
__device__ Affine<A> affine_of(const Statistics<A>& f, int64_t channel, int64_t channels) {
  const A scale = f.weight[channel] * inverse_std(f, channel);
  return {f.centre[channel], scale, f.bias[channel] - f.centre[channels + channel] * scale};
}

template <class T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(Layout v, ChannelPlan p, const T* __restrict__ x, Statistics<Accumulator<T>> f, T* __restrict__ out) {
  using A = Accumulator<T>;
  Walk<V, kColumns> walk(v, p);
  if (walk.left == 0) return;
  Affine<A> affine[Walk<V, kColumns>::kSlots];
  for (int s = 0; s < walk.kSlots; ++s) affine[s] = affine_of(f, walk.channel + s, v.channels);
  while (walk.left > 0) {
    int64_t offsets[kAtOnce];
    T raw[kAtOnce][V];
    const int valid = walk.next(offsets);
    load_all(x, offsets, valid, raw);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k >= valid) continue;
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        const A y = affine[walk.slot(lane)].y(static_cast<A>(raw[k][lane]));
        raw[k][lane] = static_cast<T>(f.relu && y < 0 ? A(0) : y);  // NaN passes, as in torch
      }
      store(raw[k], out + offsets[k]);
    }
  }
}

struct GradientSums {
  double sum = 0, dot = 0;

  __device__ void merge(const GradientSums& more) {
    sum += more.sum;
    dot += more.dot;
  }
};

// sums (2, C): the sum of dy behind the relu, and of dy (x - mean) / sqrt(var + eps).
template <class A>
struct SumsOutput {
  Statistics<A> f;
  int64_t channels;
  A* sums;

  __device__ void operator()(int64_t c, const GradientSums& found) const {
    const double dot = found.dot - f.centre[channels + c] * found.sum;
    sums[c] = static_cast<A>(found.sum);
    sums[channels + c] = static_cast<A>(dot * inverse_std(f, c));
  }
};

template <class T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(Layout v, ChannelPlan p, const T* __restrict__ dy, const T* __restrict__ x, GradientSums* splits,
                SumsOutput<Accumulator<T>> out) {
  using A = Accumulator<T>;
  Walk<V, kColumns> walk(v, p);
  constexpr int S = Walk<V, kColumns>::kSlots;
  const Statistics<A>& f = out.f;
  Affine<A> affine[S] = {};
  GradientSums own[S];
  if (walk.inside)
    for (int s = 0; s < S; ++s) affine[s] = affine_of(f, walk.channel + s, v.channels);
  while (walk.left > 0) {
    int64_t offsets[kAtOnce];
    T raw_x[kAtOnce][V], raw_dy[kAtOnce][V];
    const int valid = walk.next(offsets);
    load_all(x, offsets, valid, raw_x);
    load_all(dy, offsets, valid, raw_dy);
    A sum[S] = {}, dot[S] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k >= valid) continue;
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        const Affine<A>& a = affine[walk.slot(lane)];
        const A number = static_cast<A>(raw_x[k][lane]);
        const A g = f.relu && a.y(number) <= 0 ? A(0) : static_cast<A>(raw_dy[k][lane]);
        sum[walk.slot(lane)] += g;
        dot[walk.slot(lane)] += g * (number - a.mean);
      }
    }
#pragma unroll
    for (int s = 0; s < S; ++s) {
      own[s].sum += sum[s];
      own[s].dot += dot[s];
    }
  }
  finish_block(own, walk.inside, walk.channel, v.channels, splits, out);
}

// dx = scale (dy - mean(dy) - x_hat mean(dy x_hat)), where the means are `each` times `sums` (2, C). If the means are
// 0, as with given statistics, a NaN or inf in x does not reach dx.
template <class T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads)
    input_grad_kernel(Layout v, ChannelPlan p, const T* __restrict__ dy, const T* __restrict__ x,
                      Statistics<Accumulator<T>> f, const Accumulator<T>* sums, double each, T* __restrict__ out) {
  using A = Accumulator<T>;
  Walk<V, kColumns> walk(v, p);
  if (walk.left == 0) return;
  constexpr int S = Walk<V, kColumns>::kSlots;
  Affine<A> affine[S];
  A slope[S], offset[S];
  for (int s = 0; s < S; ++s) {
    const int64_t c = walk.channel + s;
    affine[s] = affine_of(f, c, v.channels);
    const double along = sums[v.channels + c] * each * inverse_std(f, c);
    slope[s] = static_cast<A>(affine[s].scale * along);
    offset[s] = static_cast<A>(affine[s].scale * (sums[c] * each - along * f.centre[v.channels + c]));
  }
  while (walk.left > 0) {
    int64_t offsets[kAtOnce];
    T raw_x[kAtOnce][V], raw_dy[kAtOnce][V];
    const int valid = walk.next(offsets);
    load_all(x, offsets, valid, raw_x);
    load_all(dy, offsets, valid, raw_dy);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k >= valid) continue;
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        const int s = walk.slot(lane);
        const A number = static_cast<A>(raw_x[k][lane]);
        const A g = f.relu && affine[s].y(number) <= 0 ? A(0) : static_cast<A>(raw_dy[k][lane]);
        const A along = slope[s] == 0 ? A(0) : slope[s] * (number - affine[s].mean);
        raw_x[k][lane] = static_cast<T>(affine[s].scale * g - (along + offset[s]));
      }
      store(raw_x[k], out + offsets[k]);
    }
  }
}

// The kernel of a plan: 16-byte vectors or single elements, columns or planes.
#define SSLKERN_KERNEL(name, T, p, v)                                                      \
  ((p).wide ? ((v).columns ? name<T, wide_lanes<T>, true> : name<T, wide_lanes<T>, false>) \
            : ((v).columns ? name<T, 1, true> : name<T, 1, false>))

template <class T>
constexpr int wide_lanes = sizeof(T) < 8 ? kVectorBytes / sizeof(T) : 1;

// Launchers. `splits` has `split_bytes` bytes for the reducing plan.
template <class T>
cudaError_t moments(const Layout& v, const ChannelPlan& p, const T* x, void* splits, Accumulator<T>* centre,
                    Accumulator<T>* variance, const Running<Accumulator<T>>& running, cudaStream_t stream) {
  using State = Moments<Accumulator<T>>;
  const MomentsOutput<T> out{x, v.columns ? 1 : v.length, v.channels, centre, variance, running};
  const int slots = v.columns && p.wide ? wide_lanes<T> : 1;
  const cudaError_t error =
      launch(SSLKERN_KERNEL(moments_kernel, T, p, v), p.grid, p.block, merging_bytes<State>(p.block, slots), stream, v,
             p, x, static_cast<State*>(splits), out);
  return error == cudaSuccess ? merge_splits(v, p, static_cast<const State*>(splits), out, stream) : error;
}

template <class T>
cudaError_t apply(const Layout& v, const ChannelPlan& p, const T* x, const Statistics<Accumulator<T>>& f, T* y,
                  cudaStream_t stream) {
  return launch(SSLKERN_KERNEL(apply_kernel, T, p, v), p.grid, p.block, 0, stream, v, p, x, f, y);
}

template <class T>
cudaError_t gradient_sums(const Layout& v, const ChannelPlan& p, const T* dy, const T* x,
                          const Statistics<Accumulator<T>>& f, void* splits, Accumulator<T>* sums,
                          cudaStream_t stream) {
  const SumsOutput<Accumulator<T>> out{f, v.channels, sums};
  const int slots = v.columns && p.wide ? wide_lanes<T> : 1;
  const cudaError_t error =
      launch(SSLKERN_KERNEL(sums_kernel, T, p, v), p.grid, p.block, merging_bytes<GradientSums>(p.block, slots), stream,
             v, p, dy, x, static_cast<GradientSums*>(splits), out);
  return error == cudaSuccess ? merge_splits(v, p, static_cast<const GradientSums*>(splits), out, stream) : error;
}

template <class T>
cudaError_t input_grad(const Layout& v, const ChannelPlan& p, const T* dy, const T* x,
                       const Statistics<Accumulator<T>>& f, const Accumulator<T>* sums, double each, T* dx,
                       cudaStream_t stream) {
  return launch(SSLKERN_KERNEL(input_grad_kernel, T, p, v), p.grid, p.block, 0, stream, v, p, dy, x, f, sums, each, dx);
}

#undef SSLKERN_KERNEL

}  // namespace sslkern::cuda
