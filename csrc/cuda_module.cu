// Bindings of the CUDA kernels: raw pointers and a stream in, nothing allocated, no torch header, one launch a call.
#include <cuda_runtime.h>

#include "../kernels/policy_loss/cuda.cuh"
#include "../kernels/transition/cuda.cuh"
#include "marshal.h"

namespace py = pybind11;

namespace {

void check(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(error));
}

// Makes a device current and then the one before it again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "no device to run on");
    if (before_ != device) check(cudaSetDevice(device), "selecting the device of the tensors");
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// (device, stream, tickets, scratch)
struct Launch {
  explicit Launch(const py::tuple& transition) {
    const py::tuple t = transition[13];
    device = t[0].cast<int>();
    stream = reinterpret_cast<cudaStream_t>(t[1].cast<uintptr_t>());
    workspace.ticket = dgf::pointer<uint32_t>(t[2].cast<uintptr_t>());
    workspace.scratch = dgf::pointer<double>(t[3].cast<uintptr_t>());
  }

  int device;
  cudaStream_t stream;
  dgf::Workspace workspace;
};

unsigned grid_of(const dgf::TransitionCall& call) {
  const int64_t blocks = call.batch * dgf::tile_count(call.numel);
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("latents: more than 2^31 - 1 blocks of 2048 elements");
  return static_cast<unsigned>(blocks);
}

// Calls as(value of the compute type) with the tensors' device current.
template <typename As>
void dispatch(const py::tuple& transition, const Launch& launch, const char* name, As&& as) {
  const DeviceGuard guard(launch.device);
  if (dgf::double_precision(transition))
    as(double{});
  else
    as(float{});
  check(cudaGetLastError(), name);
}

void sample(const py::tuple& transition, const py::object& noise, const py::object& seed, uintptr_t sample_ids,
            const py::object& denoised, uintptr_t log_prob) {
  const dgf::TransitionCall call = dgf::transition_call(transition);
  const dgf::NoiseSource source = dgf::noise_source(noise, seed, sample_ids, call.numel);
  const dgf::Operand clean = dgf::operand(denoised, call.numel);
  const Launch launch(transition);
  dispatch(transition, launch, "transition_sample", [&](auto type) {
    using S = decltype(type);
    dgf::transition_sample_kernel<S><<<grid_of(call), dgf::kThreads, 0, launch.stream>>>(
        call, source, clean, dgf::moves_in_packets(call, source, clean), launch.workspace, dgf::pointer<S>(log_prob));
  });
}

void log_prob(const py::tuple& transition, uintptr_t out) {
  const dgf::TransitionCall call = dgf::transition_call(transition);
  const Launch launch(transition);
  dispatch(transition, launch, "transition_log_prob", [&](auto type) {
    using S = decltype(type);
    dgf::transition_log_prob_kernel<S><<<grid_of(call), dgf::kThreads, 0, launch.stream>>>(
        call, dgf::step_moves_in_packets(call), launch.workspace, dgf::pointer<S>(out));
  });
}

// `terms` gives the gradient's terms in the compute type it is handed.
template <typename Terms>
void gradient(const py::tuple& transition, const char* name, Terms&& terms) {
  const dgf::TransitionCall call = dgf::transition_call(transition);
  const Launch launch(transition);
  dispatch(transition, launch, name, [&](auto type) {
    const auto g = terms(type, call.numel);
    dgf::transition_gradient_kernel<<<grid_of(call), dgf::kThreads, 0, launch.stream>>>(call, g,
                                                                                        dgf::moves_in_packets(call, g));
  });
}

void log_prob_gradient(const py::tuple& transition, uintptr_t grad_log_prob, const py::object& grad_output,
                       const py::object& grad_uncond) {
  gradient(transition, "transition_log_prob_gradient", [&](auto type, int64_t numel) {
    return dgf::log_prob_gradient_terms<decltype(type)>(grad_log_prob, grad_output, grad_uncond, numel);
  });
}

void policy_loss(const py::tuple& transition, const py::object& reference, const py::object& old_output,
                 uintptr_t old_log_prob, uintptr_t advantages, uintptr_t weight, double clip_range,
                 double advantage_clip, double kl_weight, bool ratio_norm, const py::tuple& out) {
  const Launch launch(transition);
  dispatch(transition, launch, "policy_loss", [&](auto type) {
    using S = decltype(type);
    const auto call = dgf::policy_loss_call<S>(transition, reference, old_output, old_log_prob, advantages, weight,
                                               clip_range, advantage_clip, kl_weight, ratio_norm);
    dgf::policy_loss_kernel<S><<<grid_of(call.transition), dgf::kThreads, 0, launch.stream>>>(
        call, dgf::moves_in_packets(call), launch.workspace, dgf::policy_loss_outputs<S>(out));
  });
}

void policy_loss_gradient(const py::tuple& transition, uintptr_t grad_loss, uintptr_t step_scale, uintptr_t pull_scale,
                          const py::object& pull, const py::object& mean_output, const py::object& grad_output,
                          const py::object& grad_uncond) {
  gradient(transition, "policy_loss_gradient", [&](auto type, int64_t numel) {
    return dgf::policy_loss_gradient_terms<decltype(type)>(grad_loss, step_scale, pull_scale, pull, mean_output,
                                                           grad_output, grad_uncond, numel);
  });
}

// Why this module cannot run on a device, or nothing.
std::string device_problem(int device) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no CUDA device: ") + cudaGetErrorString(error);
  }
  if (device < 0 || device >= count)
    return "device " + std::to_string(device) + " of " + std::to_string(count) + " does not exist";
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&dgf::transition_log_prob_kernel<float>));
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string("the kernels do not load on this device: ") + cudaGetErrorString(error);
}

// Tickets, which must be zero, and doubles of scratch, which may hold anything.
py::tuple workspace_size(int64_t batch, int64_t numel) {
  return py::make_tuple(batch + 1, dgf::scratch_size(batch, numel));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of dancegrpo_fast";
  m.attr("table_columns") = static_cast<int>(dgf::kColumns);
  m.attr("compiler") = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
  m.attr("architectures") = DGF_CUDA_ARCHITECTURES;
  m.def("device_problem", &device_problem);
  m.def("workspace_size", &workspace_size);
  m.def("transition_sample", &sample);
  m.def("transition_log_prob", &log_prob);
  m.def("transition_log_prob_gradient", &log_prob_gradient);
  m.def("policy_loss", &policy_loss);
  m.def("policy_loss_gradient", &policy_loss_gradient);
}
