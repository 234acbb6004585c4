// Operators for batch moments and batch norm on CUDA tensors.
#include "batch_norm.cuh"
#include "bindings.h"

namespace sslkern::cuda {
namespace {

Layout layout_of(const Tensor& x) {
  const Channels v = channels_of(x);
  return {v.rows, v.channels, v.length, v.length == 1};
}

template <class... Tensors>
ChannelPlan plan_for(const Tensor& x, int64_t blocks, const Tensors&... others) {
  const bool all_aligned = (aligned(x.const_data_ptr()) && ... && aligned(others.const_data_ptr()));
  return plan(layout_of(x), x.element_size(), all_aligned, blocks);
}

Tensor bytes(const Tensor& x, int64_t count) {
  return stable::new_empty(x, {count}, ScalarType::Byte);
}

Tensor channel_tensor(const Tensor& x, const Shape& front = {}) {
  Shape shape = front;
  shape.push_back(x.size(1));
  return stable::new_empty(x, shape, accumulation_dtype(x));
}

// The parameters of a normalisation, in the form that the kernels take.
struct Given {
  const Tensor &weight, &bias, &centre, &variance;
  double eps;
  bool relu;

  template <class A>
  Statistics<A> as() const {
    return {data<A>(weight), data<A>(bias), data<A>(centre), data<A>(variance), static_cast<A>(eps), relu};
  }
};

void run_moments(const Tensor& x, const Tensor& centre, const Tensor& variance,
                 const std::optional<Tensor>& running_mean = {}, const std::optional<Tensor>& running_var = {},
                 double momentum = 0) {
  const Layout v = layout_of(x);
  const ChannelPlan p = plan_for(x, kReducingBlocks);
  as_stored(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const Tensor splits = bytes(x, split_bytes<Moments<A>>(v, p));
    const Running<A> running{running_mean ? data<A>(*running_mean) : nullptr,
                             running_var ? data<A>(*running_var) : nullptr, static_cast<A>(momentum)};
    check(moments<T>(v, p, data<T>(x), data<void>(splits), data<A>(centre), data<A>(variance), running,
                     current_stream(x)),
          "batch_moments_fwd");
  });
}

void run_apply(const Tensor& x, const Given& given, const Tensor& y) {
  const ChannelPlan p = plan_for(x, kMappingBlocks, y);
  as_stored(x, [&](auto zero) {
    using T = decltype(zero);
    check(apply<T>(layout_of(x), p, data<T>(x), given.as<Accumulator<T>>(), data<T>(y), current_stream(x)),
          "batch_norm_apply");
  });
}

void run_sums(const Tensor& dy, const Tensor& x, const Given& given, const Tensor& sums) {
  const Layout v = layout_of(x);
  const ChannelPlan p = plan_for(x, kReducingBlocks, dy);
  as_stored(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const Tensor splits = bytes(x, split_bytes<GradientSums>(v, p));
    check(gradient_sums<T>(v, p, data<T>(dy), data<T>(x), given.as<A>(), data<void>(splits), data<A>(sums),
                           current_stream(x)),
          "batch_norm_sums");
  });
}

void run_input_grad(const Tensor& dy, const Tensor& x, const Given& given, const Tensor& sums, double each,
                    const Tensor& dx) {
  const ChannelPlan p = plan_for(x, kMappingBlocks, dy, dx);
  as_stored(x, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    check(input_grad<T>(layout_of(x), p, data<T>(dy), data<T>(x), given.as<A>(), data<A>(sums), each, data<T>(dx),
                        current_stream(x)),
          "batch_norm_input_grad");
  });
}

// Called first by every operator: checks that x is on a GPU, and makes that GPU current for the call.
stable::accelerator::DeviceGuard on_device_of(const Tensor& x) {
  check_cuda(x, "x");
  return stable::accelerator::DeviceGuard(x.get_device_index());
}

std::tuple<Tensor, Tensor> batch_moments_fwd(const Tensor x) {
  const auto guard = on_device_of(x);
  Tensor centre = channel_tensor(x, {2}), variance = channel_tensor(x);
  run_moments(x, centre, variance);
  return {centre, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor x, const Tensor weight, const Tensor bias,
                                                  std::optional<Tensor> running_mean, std::optional<Tensor> running_var,
                                                  double momentum, double eps, bool relu) {
  const auto guard = on_device_of(x);
  Tensor y = stable::empty_like(x), centre = channel_tensor(x, {2}), variance = channel_tensor(x);
  run_moments(x, centre, variance, running_mean, running_var, momentum);
  run_apply(x, {weight, bias, centre, variance, eps, relu}, y);
  return {y, centre, variance};
}

std::tuple<Tensor, Tensor> batch_norm_bwd(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias,
                                          const Tensor centre, const Tensor variance, double eps, bool relu) {
  const auto guard = on_device_of(x);
  const Given given{weight, bias, centre, variance, eps, relu};
  Tensor dx = stable::empty_like(x), sums = channel_tensor(x, {2});
  run_sums(dy, x, given, sums);
  run_input_grad(dy, x, given, sums, 1. / layout_of(x).count(), dx);
  return {dx, sums};
}

Tensor batch_norm_apply(const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                        const Tensor variance, double eps, bool relu) {
  const auto guard = on_device_of(x);
  Tensor y = stable::empty_like(x);
  run_apply(x, {weight, bias, centre, variance, eps, relu}, y);
  return y;
}

Tensor batch_norm_sums(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias, const Tensor centre,
                       const Tensor variance, double eps, bool relu) {
  const auto guard = on_device_of(x);
  Tensor sums = channel_tensor(x, {2});
  run_sums(dy, x, {weight, bias, centre, variance, eps, relu}, sums);
  return sums;
}

Tensor batch_norm_input_grad(const Tensor dy, const Tensor x, const Tensor weight, const Tensor bias,
                             const Tensor centre, const Tensor variance, const Tensor means, double eps, bool relu) {
  const auto guard = on_device_of(x);
  Tensor dx = stable::empty_like(x);
  run_input_grad(dy, x, {weight, bias, centre, variance, eps, relu}, means, 1., dx);
  return dx;
}

}  // namespace
}  // namespace sslkern::cuda

STABLE_TORCH_LIBRARY_IMPL(sslkern_native, CUDA, m) {
  m.impl("batch_moments_fwd", TORCH_BOX(&sslkern::cuda::batch_moments_fwd));
  m.impl("batch_norm_fwd", TORCH_BOX(&sslkern::cuda::batch_norm_fwd));
  m.impl("batch_norm_bwd", TORCH_BOX(&sslkern::cuda::batch_norm_bwd));
  m.impl("batch_norm_apply", TORCH_BOX(&sslkern::cuda::batch_norm_apply));
  m.impl("batch_norm_sums", TORCH_BOX(&sslkern::cuda::batch_norm_sums));
  m.impl("batch_norm_input_grad", TORCH_BOX(&sslkern::cuda::batch_norm_input_grad));
}
