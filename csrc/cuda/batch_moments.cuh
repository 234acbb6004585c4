// Batch moments on a GPU. See batch_norm.cuh for how a grid covers x.
#pragma once

#include "channels.cuh"

namespace sslkern::cuda {

// Moments of one slot: the count, the mean, and the sum of squares about it.
template <class A>
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  __device__ void merge(const Moments& more) {
    const double total = count + more.count;
    if (total == 0) return;
    add(more.mean, more.m2, static_cast<A>(more.count) / static_cast<A>(total), count);
    count = total;
  }
  // Chan's merge. `share` is the new elements' share of the total, `before` the count before. An fp32 share has a small
  // relative error in the difference of means, and saves an fp64 division.
  __device__ void add(double its_mean, double its_m2, double share, double before) {
    const double delta = its_mean - mean;
    mean += delta * share;
    m2 += its_m2 + delta * delta * share * before;
  }
};

// Running statistics, (C) or nullptr, which move towards the statistics of a batch.
template <class A>
struct Running {
  A *mean = nullptr, *variance = nullptr;
  A momentum = 0;

  __device__ void track(A* running, int64_t channel, A batch) const {
    if (running != nullptr) running[channel] += momentum * (batch - running[channel]);
  }
};

// Destination of a channel's moments. centre (2, C) is the mean as high + low. variance (C) is biased; the running
// variance is unbiased. Moments are about the first element of the channel; first elements of successive channels are
// `pitch` apart.
template <class T>
struct MomentsOutput {
  using A = Accumulator<T>;
  const T* x;
  int64_t pitch, channels;
  A *centre, *variance;
  Running<A> running;

  __device__ A pivot(int64_t channel) const {
    return static_cast<A>(x[channel * pitch]);
  }
  __device__ void operator()(int64_t c, const Moments<A>& found) const {
    const double mean = pivot(c) + found.mean;
    const A high = static_cast<A>(mean);
    centre[c] = high;
    centre[channels + c] = static_cast<A>(static_cast<double>(pivot(c)) - high + found.mean);
    variance[c] = static_cast<A>(found.m2 / found.count);
    running.track(running.mean, c, high);
    running.track(running.variance, c, static_cast<A>(found.m2 / (found.count - 1)));
  }
};

// Each thread takes two passes over the vectors that it loads at once. All slots of a thread have the same count, so
// they share a division.
template <class T, int V, bool kColumns>
__global__ void __launch_bounds__(kThreads) moments_kernel(Layout v, ChannelPlan p, const T* __restrict__ x,
                                                           Moments<Accumulator<T>>* splits, MomentsOutput<T> out) {
  using A = Accumulator<T>;
  Walk<V, kColumns> walk(v, p);
  constexpr int S = Walk<V, kColumns>::kSlots;
  A pivot[S] = {};
  Moments<A> own[S];
  if (walk.inside)
    for (int s = 0; s < S; ++s) pivot[s] = out.pivot(walk.channel + s);
  double count = 0;
  int64_t offsets[kAtOnce];
  T raw[kAtOnce][V];
  int valid = walk.next(offsets);
  load_all(x, offsets, valid, raw);
  while (valid > 0) {
    A sum[S] = {}, square[S] = {};
    A d[kAtOnce][V];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        d[k][lane] = k < valid ? static_cast<A>(raw[k][lane]) - pivot[walk.slot(lane)] : A(0);
        sum[walk.slot(lane)] += d[k][lane];
      }
    const int here = valid;
    const A numbers = walk.each(here), each = A(1) / numbers;
    valid = walk.next(offsets);
    load_all(x, offsets, valid, raw);  // the next loads overlap the arithmetic on these
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
      for (int lane = 0; lane < V; ++lane) {
        const A e = k < here ? d[k][lane] - sum[walk.slot(lane)] * each : A(0);
        square[walk.slot(lane)] += e * e;
      }
    const double total = count + numbers, share = numbers / static_cast<A>(total);
#pragma unroll
    for (int s = 0; s < S; ++s) own[s].add(sum[s] * each, square[s], share, count);
    count = total;
  }
#pragma unroll
  for (int s = 0; s < S; ++s) own[s].count = count;
  finish_block(own, walk.inside, walk.channel, v.channels, splits, out);
}

}  // namespace sslkern::cuda
