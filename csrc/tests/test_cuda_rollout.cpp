// The public face of the CUDA rollout. Without a GPU: what it says about that. With one: the
// kernels against the CPU's rollout.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "iqmpc/cuda_rollout.hpp"
#include "models.hpp"

namespace {

using iqmpc::Precision;
using iqmpc::Score;
using Floats = std::vector<float>;

// Device memory with a copy of `values`.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : size_(values.size() * sizeof(T)) {
    CHECK(cudaMalloc(&data_, std::max<std::size_t>(size_, 1)) == cudaSuccess);
    CHECK(cudaMemcpy(data_, values.data(), size_, cudaMemcpyHostToDevice) == cudaSuccess);
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* data() const { return static_cast<T*>(data_); }
  std::vector<T> values() const {
    std::vector<T> copy(size_ / sizeof(T));
    CHECK(cudaMemcpy(copy.data(), data_, size_, cudaMemcpyDeviceToHost) == cudaSuccess);
    return copy;
  }

 private:
  void* data_ = nullptr;
  std::size_t size_;
};

void says_why_there_is_no_device() {
  const std::string reason = iqmpc::cuda_unavailable_reason();
  std::printf("%s\n", reason.c_str());
  CHECK(reason.find("no CUDA device can be used: cudaError") == 0);
  CHECK(!iqmpc::cuda_available() && iqmpc::cuda_device_count() == 0);
  const RandomModel model({});
  CHECK(message_of<std::runtime_error>(
            [&] { iqmpc::CudaWorldModel(model.view, Precision::bf16); }) == reason);
  CHECK(message_of<std::runtime_error>([] {
          iqmpc::cuda_device_name(0);
        }).find("cannot ask for the name of CUDA device 0: cudaError") == 0);
  // What the caller can mend comes first.
  RandomModel broken({});
  broken.view.simnorm_dim = 5;
  CHECK(message_of<std::invalid_argument>([&] {
          iqmpc::CudaWorldModel(broken.view, Precision::bf16);
        }) == "simnorm_dim: must divide the latent size 24, got 5");
}

void is_the_cpus(std::ptrdiff_t envs, std::ptrdiff_t horizon, std::ptrdiff_t samples,
                 const Sizes& sizes) {
  const RandomModel model(sizes);
  iqmpc::ThreadPool pool(1);
  for (const Score score : {Score::advantage, Score::unrolled}) {
    const std::ptrdiff_t steps = horizon + (score == Score::unrolled ? 1 : -1);
    const std::ptrdiff_t rows = envs * samples * sizes.action;
    const Floats z0 = normal_floats(envs * sizes.latent, 1);
    Floats actions = normal_floats(horizon * rows, 2);
    for (float& a : actions) a = std::clamp(a, -1.0f, 1.0f);
    const Floats noise = normal_floats(steps * rows, 3);
    Floats expected(static_cast<std::size_t>(envs * samples));
    iqmpc::RolloutView host{envs,   horizon, samples, z0.data(), actions.data(), noise.data(),
                            {1, 0}, 0.99f,   score,   0.01f,     expected.data()};
    iqmpc::rollout(*model.pack(), pool, host);

    const OnDevice<float> d_z0(z0), d_actions(actions), d_noise(noise);
    const OnDevice<std::int64_t> pair({1, 0});
    for (const Precision precision : {Precision::float32, Precision::bf16}) {
      const iqmpc::CudaWorldModel packed(model.view, precision);
      const OnDevice<unsigned char> work(std::vector<unsigned char>(packed.work_bytes(envs), 0xff));
      // Some room behind the returns, which must stay as it is.
      const OnDevice<float> returns(Floats(expected.size() + 16, 42.0f));
      iqmpc::cuda_rollout(packed,
                          {envs, horizon, samples, d_z0.data(), d_actions.data(), d_noise.data(),
                           pair.data(), 0.99f, score, 0.01f, returns.data(), work.data(), nullptr});
      CHECK(cudaDeviceSynchronize() == cudaSuccess);
      const Floats got = returns.values();
      double difference = 0, scale = 0;
      for (std::size_t i = 0; i < expected.size(); ++i) {
        difference += std::pow(double(got[i]) - double(expected[i]), 2);
        scale += std::pow(double(expected[i]), 2);
      }
      const double error = std::sqrt(difference / std::max(scale, double(expected.size())));
      std::printf("E %td H %td S %td %s: %.1e\n", envs, horizon, samples, precision_name(precision),
                  error);
      CHECK(error < (precision == Precision::bf16 ? 2e-2 : 1e-4));
      CHECK(std::all_of(got.end() - 16, got.end(), [](float x) { return x == 42.0f; }));
    }
  }
}

}  // namespace

int main() {
  if (iqmpc::cuda_device_count() == 0) {
    says_why_there_is_no_device();
    return 0;
  }
  if (!iqmpc::cuda_available()) {
    std::printf("%s\n", iqmpc::cuda_unavailable_reason().c_str());
    return 0;
  }
  std::printf("%s\n", iqmpc::cuda_device_name(0).c_str());
  is_the_cpus(1, 1, 1, {5, 1, 8, 24, 3, 2, 8});
  is_the_cpus(3, 3, 67, {5, 3, 24, 37, 9, 3, 8});
  is_the_cpus(2, 4, 29, {7, 17, 136, 100, 33, 2, 8});
  is_the_cpus(1, 2, 130, {7, 16, 30, 65, 33, 2, 2});
  is_the_cpus(2, 3, 512, {17, 39, 512, 512, 64, 2, 8});
  is_the_cpus(40, 3, 512, {17, 6, 128, 384, 64, 2, 8});
  return 0;
}
