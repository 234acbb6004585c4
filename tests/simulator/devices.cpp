// Two CUDA devices for torch where there is none: fake tensors can be on them, and autograd runs its backward threads.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using c10::DeviceIndex;
using c10::DeviceType;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override {
    return 2;
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
};

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(DeviceIndex index) {
    device_ = c10::Device(DeviceType::CUDA, index);
  }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override {
    return true;
  }
  void init() const override {}
  DeviceIndex deviceCount() const override {
    return 2;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index);
  }
};
}  // namespace

namespace at {
// torch asks for them once, while it is imported: this library is to be loaded before
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, Hooks)
}  // namespace at

// After torch is imported: a torch that is built for CUDA has then registered its own.
extern "C" __attribute__((visibility("default"))) void sslkern_use_devices() {
  c10::impl::registerDeviceGuard(DeviceType::CUDA, new Guard());
}
