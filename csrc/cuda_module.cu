// Bindings of the CUDA kernels: raw pointers and a stream in, nothing allocated, no torch header, one launch a call.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>
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

// (stream, tickets, scratch) on the current device; a kernel without sums needs the stream only.
struct Launch {
  explicit Launch(const py::tuple& transition, bool sums = true) {
    const py::tuple t = dgf::tuple_of("launch", transition[13], 3, 3);
    stream = reinterpret_cast<cudaStream_t>(t[0].cast<uintptr_t>());
    if (!sums) return;
    workspace.ticket = dgf::pointer<uint32_t>("tickets", t[1].cast<uintptr_t>());
    workspace.scratch = dgf::pointer<double>("scratch", t[2].cast<uintptr_t>());
  }

  cudaStream_t stream;
  dgf::Workspace workspace;
};

unsigned grid_of(const dgf::TransitionCall& call) {
  const int64_t blocks = call.batch * dgf::tile_count(call.numel);
  if (blocks > 0x7FFFFFFF) throw std::invalid_argument("latents: more than 2^31 - 1 blocks of 8192 elements");
  return static_cast<unsigned>(blocks);
}

// Calls as(value of the compute type), which parses and gives back a launch; that is made without the interpreter's
// lock, as it waits where the stream's queue is full.
template <typename As>
void dispatch(const py::tuple& transition, const char* name, As&& as) {
  const auto run = [&](auto type) {
    const auto launch = as(type);
    const py::gil_scoped_release unlocked;
    launch();
  };
  if (dgf::double_precision(transition))
    run(double{});
  else
    run(float{});
  check(cudaGetLastError(), name);
}

void sample(const py::tuple& transition, const py::object& noise, const py::object& seed, uintptr_t sample_ids,
            const py::object& denoised, uintptr_t log_prob) {
  const dgf::TransitionCall call = dgf::transition_call(transition);
  const dgf::NoiseSource source = dgf::noise_source(noise, seed, sample_ids, call.numel);
  const dgf::Operand clean = dgf::optional_operand("denoised", denoised, call.numel);
  const Launch launch(transition);
  const unsigned grid = grid_of(call);
  const bool packets = dgf::moves_in_packets(call, source, clean);
  dispatch(transition, "transition_sample", [&](auto type) {
    using S = decltype(type);
    S* out = dgf::pointer<S>("log_prob", log_prob);
    return [=, &call, &source, &clean, &launch] {
      if constexpr (std::is_same<S, float>::value) {
        if (dgf::may_be_usual(call, source, clean, packets) && dgf::if_usual(call, [&](auto usual) {
              dgf::usual_sample_kernel<decltype(usual)>
                  <<<grid, dgf::kThreads, 0, launch.stream>>>(call, source, launch.workspace, out);
            }))
          return;
      }
      dgf::transition_sample_kernel<S>
          <<<grid, dgf::kThreads, 0, launch.stream>>>(call, source, clean, packets, launch.workspace, out);
    };
  });
}

void log_prob(const py::tuple& transition, uintptr_t log_prob) {
  const dgf::TransitionCall call = dgf::transition_call(transition);
  const Launch launch(transition);
  const unsigned grid = grid_of(call);
  const bool packets = dgf::step_moves_in_packets(call);
  dispatch(transition, "transition_log_prob", [&](auto type) {
    using S = decltype(type);
    S* out = dgf::pointer<S>("log_prob", log_prob);
    return [=, &call, &launch] {
      dgf::transition_log_prob_kernel<S>
          <<<grid, dgf::kThreads, 0, launch.stream>>>(call, packets, launch.workspace, out);
    };
  });
}

// `terms` gives the gradient's terms in the compute type it is handed.
template <typename Terms>
void gradient(const py::tuple& transition, const char* name, Terms&& terms) {
  const dgf::TransitionCall call = dgf::transition_call(transition);
  const Launch launch(transition, false);
  const unsigned grid = grid_of(call);
  dispatch(transition, name, [&](auto type) {
    const auto g = terms(type, call);
    const bool packets = dgf::moves_in_packets(call, g);
    return [=, &call, &launch] {
      dgf::transition_gradient_kernel<<<grid, dgf::kThreads, 0, launch.stream>>>(call, g, packets);
    };
  });
}

void log_prob_gradient(const py::tuple& transition, uintptr_t grad_log_prob, const py::object& grad_output,
                       const py::object& grad_uncond) {
  gradient(transition, "transition_log_prob_gradient", [&](auto type, const dgf::TransitionCall& call) {
    return dgf::log_prob_gradient_terms<decltype(type)>(call, grad_log_prob, grad_output, grad_uncond);
  });
}

void policy_loss(const py::tuple& transition, const py::object& reference, const py::object& old_output,
                 uintptr_t old_log_prob, uintptr_t advantages, uintptr_t weight, double clip_low, double clip_high,
                 double advantage_clip, double kl_weight, bool ratio_norm, const py::tuple& out) {
  const dgf::TransitionCall step = dgf::transition_call(transition);
  const Launch launch(transition);
  const unsigned grid = grid_of(step);
  dispatch(transition, "policy_loss", [&](auto type) {
    using S = decltype(type);
    const auto call = dgf::policy_loss_call<S>(step, reference, old_output, old_log_prob, advantages, weight, clip_low,
                                               clip_high, advantage_clip, kl_weight, ratio_norm);
    const auto outputs = dgf::policy_loss_outputs<S>(out);
    const bool packets = dgf::moves_in_packets(call);
    return [=, &launch] {
      dgf::policy_loss_kernel<S><<<grid, dgf::kThreads, 0, launch.stream>>>(call, packets, launch.workspace, outputs);
    };
  });
}

void policy_loss_gradient(const py::tuple& transition, uintptr_t grad_loss, uintptr_t step_scale, uintptr_t pull_scale,
                          const py::object& pull, const py::object& mean_output, const py::object& grad_output,
                          const py::object& grad_uncond) {
  gradient(transition, "policy_loss_gradient", [&](auto type, const dgf::TransitionCall& call) {
    return dgf::policy_loss_gradient_terms<decltype(type)>(call, grad_loss, step_scale, pull_scale, pull, mean_output,
                                                           grad_output, grad_uncond);
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
