#include "iqmpc/cuda_rollout.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/launch.hpp"

namespace iqmpc {

namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not to be found by the next caller, who did nothing wrong
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

// The device in use while this lives.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&before_), "cannot ask for the CUDA device in use");
    if (device != before_) {
      check(cudaSetDevice(device), "cannot use CUDA device " + std::to_string(device));
    }
  }
  ~DeviceScope() { cudaSetDevice(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, what, device),
        "cannot ask for the properties of CUDA device " + std::to_string(device));
  return value;
}

// The oldest architecture that there are kernels for, sm_80: bf16 in the tensor cores.
constexpr int kMajor = 8;

// Why `device` cannot run the kernels; empty where it can.
std::string unfit(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  if (major >= kMajor) return "";
  return cuda_device_name(device) + " has compute capability " + std::to_string(major) + "." +
         std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device)) +
         ", the kernels need 8.0";
}

}  // namespace

std::string cuda_unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no CUDA device can be used: ") + cudaGetErrorName(error) + ", " +
           cudaGetErrorString(error);
  }
  std::string reason = "no CUDA device can be used: the driver shows none";
  for (int device = 0; device < count; ++device) {
    reason = unfit(device);
    if (reason.empty()) return reason;
  }
  return reason;
}

bool cuda_available() { return cuda_unavailable_reason().empty(); }

int cuda_device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::string cuda_device_name(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device),
        "cannot ask for the name of CUDA device " + std::to_string(device));
  return properties.name;
}

struct CudaWorldModel::State {
  State(gpu::PackedModel packed, int on)
      : precision(packed.precision), model(packed.model), device(on) {
    const DeviceScope scope(device);
    const std::string reason = unfit(device);
    if (!reason.empty()) throw std::runtime_error(reason);
    processors = attribute(cudaDevAttrMultiProcessorCount, device);
    rows = gpu::fitting_rows(
        model, precision,
        static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        cuda_device_name(device));
    for (const int count : rows) {
      // All that the device has, since the setting is the kernel's and other models share it.
      check(gpu::allow_shared(precision, count,
                              static_cast<std::size_t>(
                                  attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))),
            "cannot set the shared memory of the CUDA kernels");
    }
    const std::size_t size = packed.bytes.size();
    check(cudaMalloc(&arena, size), "cannot take " + std::to_string(size) +
                                        " bytes of memory on CUDA device " +
                                        std::to_string(device));
    // On a stream of its own and waited for: other streams may read the copy as soon as this
    // returns, and none of them is held up by it.
    cudaStream_t stream = nullptr;
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) {
      error = cudaMemcpyAsync(arena, packed.bytes.data(), size, cudaMemcpyHostToDevice, stream);
      const cudaError_t waited = cudaStreamSynchronize(stream);
      if (error == cudaSuccess) error = waited;
      cudaStreamDestroy(stream);
    }
    if (error != cudaSuccess) cudaFree(arena);
    check(error, "cannot copy the model to CUDA device " + std::to_string(device));
  }

  // Errors are of no use here: at the end of a process the driver may be gone before us.
  ~State() {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    cudaFree(arena);
    cudaSetDevice(before);
    cudaGetLastError();
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  Precision precision;
  gpu::ModelData model;
  int device;
  int processors = 0;
  std::vector<int> rows;  // of a tile: those that fit
  void* arena = nullptr;
};

namespace {

// The driver first, whose absence would otherwise be an error about a device's number.
gpu::PackedModel packed_for_a_device(const WorldModelView& view, Precision precision) {
  gpu::PackedModel packed = gpu::pack(view, precision);
  const std::string reason = cuda_unavailable_reason();
  if (!reason.empty()) throw std::runtime_error(reason);
  return packed;
}

}  // namespace

CudaWorldModel::CudaWorldModel(const WorldModelView& view, Precision precision, int device)
    : state_(std::make_unique<const State>(packed_for_a_device(view, precision), device)) {}
CudaWorldModel::~CudaWorldModel() = default;
CudaWorldModel::CudaWorldModel(CudaWorldModel&&) noexcept = default;
CudaWorldModel& CudaWorldModel::operator=(CudaWorldModel&&) noexcept = default;

std::ptrdiff_t CudaWorldModel::action_dim() const noexcept { return state_->model.action_dim; }
std::ptrdiff_t CudaWorldModel::latent_dim() const noexcept { return state_->model.latent_dim; }
std::ptrdiff_t CudaWorldModel::num_critics() const noexcept { return state_->model.num_critics; }
Precision CudaWorldModel::precision() const noexcept { return state_->precision; }
int CudaWorldModel::device() const noexcept { return state_->device; }

std::size_t CudaWorldModel::work_bytes(std::ptrdiff_t problems) const noexcept {
  return gpu::work_floats(state_->model, problems) * sizeof(float);
}

void cuda_rollout(const CudaWorldModel& model, const CudaRolloutView& view) {
  const CudaWorldModel::State& state = *model.state_;
  const gpu::RolloutArgs args = gpu::rollout_args(state.model, view);
  if (view.problems == 0 || view.samples == 0) return;
  const DeviceScope scope(state.device);
  const int rows = gpu::choose_rows(state.rows, view.problems, view.samples, state.processors);
  check(gpu::launch(state.precision, rows, static_cast<const unsigned char*>(state.arena),
                    state.model, args, static_cast<cudaStream_t>(view.stream)),
        "cannot launch the rollout on CUDA device " + std::to_string(state.device));
}

}  // namespace iqmpc
