// Bindings of the CUDA kernels: raw pointers and a stream in, nothing allocated, no torch header, one launch a call.
#include <cuda_runtime.h>

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "../kernels/policy_loss/cuda.cuh"
#include "../kernels/transition/cuda.cuh"
#include "marshal.h"

namespace py = pybind11;

namespace {

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  throw std::runtime_error(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(error));
}

// Tickets are zero when the module is loaded, and every kernel leaves them so. They are no allocation of torch's, which
// would belong to whatever graph or pool happens to be active at the first call.
constexpr int64_t kTickets = 1 << 20;
__device__ uint32_t ticket_pool[kTickets];

struct TicketPool {
  uint32_t* first = nullptr;
  int64_t used = 0;
  std::unordered_map<uintptr_t, std::pair<int64_t, int64_t>> of_stream;  // offset, count
};

// The address of `count` tickets for the current device: of a stream always the same ones, as its launches follow one
// another; of a captured launch its own, as graphs may run side by side. 0 where the pool is used up.
uintptr_t tickets(int device, uintptr_t stream, int64_t count, bool captured) {
  static std::unordered_map<int, TicketPool> pools;  // guarded by the interpreter's lock
  TicketPool& pool = pools[device];
  if (!pool.first)
    check(cudaGetSymbolAddress(reinterpret_cast<void**>(&pool.first), ticket_pool), "finding the tickets");
  const auto kept = pool.of_stream.find(stream);
  if (!captured && kept != pool.of_stream.end() && kept->second.second >= count)
    return reinterpret_cast<uintptr_t>(pool.first + kept->second.first);
  const int64_t size = captured ? count : std::max<int64_t>(count, 1024);
  if (pool.used + size > kTickets) return 0;
  const int64_t offset = pool.used;
  pool.used += size;
  if (!captured) pool.of_stream[stream] = {offset, size};
  return reinterpret_cast<uintptr_t>(pool.first + offset);
}

// (stream, tickets, scratch) on the current device
struct Launch {
  explicit Launch(const py::tuple& transition) {
    const py::tuple t = transition[13];
    stream = reinterpret_cast<cudaStream_t>(t[0].cast<uintptr_t>());
    workspace.ticket = dgf::pointer<uint32_t>(t[1].cast<uintptr_t>());
    workspace.scratch = dgf::pointer<double>(t[2].cast<uintptr_t>());
  }

  cudaStream_t stream;
  dgf::Workspace workspace;
};

unsigned grid_of(const dgf::TransitionCall& call) {
  const int64_t blocks = call.batch * dgf::tile_count(call.numel);
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("latents: more than 2^31 - 1 blocks of 8192 elements");
  return static_cast<unsigned>(blocks);
}

// Calls as(value of the compute type), which parses and launches.
template <typename As>
void dispatch(const py::tuple& transition, const char* name, As&& as) {
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
  dispatch(transition, "transition_sample", [&](auto type) {
    using S = decltype(type);
    const unsigned grid = grid_of(call);
    const bool packets = dgf::moves_in_packets(call, source, clean);
    const py::gil_scoped_release unlocked;  // a launch waits where the stream's queue is full
    dgf::transition_sample_kernel<S><<<grid, dgf::kThreads, 0, launch.stream>>>(
        call, source, clean, packets, launch.workspace, dgf::pointer<S>(log_prob));
  });
}

void log_prob(const py::tuple& transition, uintptr_t out) {
  const dgf::TransitionCall call = dgf::transition_call(transition);
  const Launch launch(transition);
  dispatch(transition, "transition_log_prob", [&](auto type) {
    using S = decltype(type);
    const unsigned grid = grid_of(call);
    const bool packets = dgf::step_moves_in_packets(call);
    const py::gil_scoped_release unlocked;
    dgf::transition_log_prob_kernel<S>
        <<<grid, dgf::kThreads, 0, launch.stream>>>(call, packets, launch.workspace, dgf::pointer<S>(out));
  });
}

// `terms` gives the gradient's terms in the compute type it is handed.
template <typename Terms>
void gradient(const py::tuple& transition, const char* name, Terms&& terms) {
  const dgf::TransitionCall call = dgf::transition_call(transition);
  const Launch launch(transition);
  dispatch(transition, name, [&](auto type) {
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
  dispatch(transition, "policy_loss", [&](auto type) {
    using S = decltype(type);
    const auto call = dgf::policy_loss_call<S>(transition, reference, old_output, old_log_prob, advantages, weight,
                                               clip_range, advantage_clip, kl_weight, ratio_norm);
    const auto outputs = dgf::policy_loss_outputs<S>(out);
    const unsigned grid = grid_of(call.transition);
    const bool packets = dgf::moves_in_packets(call);
    const py::gil_scoped_release unlocked;
    dgf::policy_loss_kernel<S><<<grid, dgf::kThreads, 0, launch.stream>>>(call, packets, launch.workspace, outputs);
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

// Why this module cannot run on the current device, or nothing.
std::string device_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&dgf::transition_log_prob_kernel<float>));
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string("the kernels do not load: ") + cudaGetErrorString(error);
}

// Doubles of scratch that a launch needs, which may hold anything.
int64_t scratch_size(int64_t batch, int64_t numel) { return dgf::scratch_size(batch, numel); }

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of dancegrpo_fast";
  m.attr("table_columns") = static_cast<int>(dgf::kColumns);
  m.attr("compiler") = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
  m.attr("architectures") = DGF_CUDA_ARCHITECTURES;
  m.def("device_problem", &device_problem);
  m.def("tickets", &tickets);
  m.def("scratch_size", &scratch_size);
  m.def("transition_sample", &sample);
  m.def("transition_log_prob", &log_prob);
  m.def("transition_log_prob_gradient", &log_prob_gradient);
  m.def("policy_loss", &policy_loss);
  m.def("policy_loss_gradient", &policy_loss_gradient);
}
