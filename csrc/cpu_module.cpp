// Bindings of the CPU kernels: raw pointers in, nothing allocated, no torch header. Python checks and allocates.
#include "../kernels/policy_loss/cpu.h"
#include "../kernels/transition/cpu.h"
#include "marshal.h"

namespace py = pybind11;

namespace {

dgf::TransitionCall checked_call(const py::tuple& t) {
  const dgf::TransitionCall call = dgf::transition_call(t);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t row = call.row_index(b);
    if (row < 0 || row >= call.table_rows)
      throw std::invalid_argument("step: got " + std::to_string(row) + ", the table has rows 0 to " +
                                  std::to_string(call.table_rows - 1));
  }
  return call;
}

int threads(const py::tuple& t) { return t[13].cast<int>(); }

// Calls `as` with a value of the type that the call computes in.
template <typename As>
void dispatch(const py::tuple& transition, As&& as) {
  if (dgf::double_precision(transition))
    as(double{});
  else
    as(float{});
}

void sample(const py::tuple& transition, const py::object& noise, const py::object& seed, uintptr_t sample_ids,
            const py::object& denoised, uintptr_t log_prob) {
  const dgf::TransitionCall call = checked_call(transition);
  const dgf::NoiseSource source = dgf::noise_source(noise, seed, sample_ids, call.numel);
  const dgf::Operand clean = dgf::operand(denoised, call.numel);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    using S = decltype(type);
    for (int64_t b = 0; b < call.batch && !source.seeded && !source.given.present(); ++b)
      if (call.row<S>(b)[dgf::kTau] != S(0))
        throw std::invalid_argument("noise: got None and no seed for a step with noise, want one of them");
    py::gil_scoped_release unlocked;
    dgf::transition_sample(call, source, clean, count, dgf::pointer<S>(log_prob));
  });
}

void log_prob(const py::tuple& transition, uintptr_t out) {
  const dgf::TransitionCall call = checked_call(transition);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    using S = decltype(type);
    py::gil_scoped_release unlocked;
    dgf::transition_log_prob(call, count, dgf::pointer<S>(out));
  });
}

void log_prob_gradient(const py::tuple& transition, uintptr_t grad_log_prob, const py::object& grad_output,
                       const py::object& grad_uncond) {
  const dgf::TransitionCall call = checked_call(transition);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    using S = decltype(type);
    const auto terms = dgf::log_prob_gradient_terms<S>(grad_log_prob, grad_output, grad_uncond, call.numel);
    py::gil_scoped_release unlocked;
    dgf::transition_gradient(call, terms, count);
  });
}

void policy_loss(const py::tuple& transition, const py::object& reference, const py::object& old_output,
                 uintptr_t old_log_prob, uintptr_t advantages, uintptr_t weight, double clip_range,
                 double advantage_clip, double kl_weight, bool ratio_norm, const py::tuple& out) {
  checked_call(transition);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    using S = decltype(type);
    const auto call = dgf::policy_loss_call<S>(transition, reference, old_output, old_log_prob, advantages, weight,
                                               clip_range, advantage_clip, kl_weight, ratio_norm);
    const auto outputs = dgf::policy_loss_outputs<S>(out);
    py::gil_scoped_release unlocked;
    dgf::policy_loss(call, count, outputs);
  });
}

// `grad_loss` is the incoming gradient, one number in the compute type.
void policy_loss_gradient(const py::tuple& transition, uintptr_t grad_loss, uintptr_t step_scale, uintptr_t pull_scale,
                          const py::object& pull, const py::object& mean_output, const py::object& grad_output,
                          const py::object& grad_uncond) {
  const dgf::TransitionCall call = checked_call(transition);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    using S = decltype(type);
    const auto terms = dgf::policy_loss_gradient_terms<S>(grad_loss, step_scale, pull_scale, pull, mean_output,
                                                          grad_output, grad_uncond, call.numel);
    py::gil_scoped_release unlocked;
    dgf::transition_gradient(call, terms, count);
  });
}

py::tuple philox(py::tuple counter, py::tuple key) {
  const dgf::Uint4 bits = dgf::philox4x32_10(dgf::Uint4{counter[0].cast<uint32_t>(), counter[1].cast<uint32_t>(),
                                                        counter[2].cast<uint32_t>(), counter[3].cast<uint32_t>()},
                                             key[0].cast<uint32_t>(), key[1].cast<uint32_t>());
  return py::make_tuple(bits.x, bits.y, bits.z, bits.w);
}

// The x86-64 level this processor runs: 1, 3 (AVX2) or 4 (AVX-512). Other architectures have one build, level 1.
int processor_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 3;
#endif
  return 1;
}

}  // namespace

PYBIND11_MODULE(DGF_MODULE_NAME, m) {
  m.doc() = "CPU kernels of dancegrpo_fast";
  m.attr("table_columns") = static_cast<int>(dgf::kColumns);
  m.attr("compiler") = __VERSION__;
  m.def("processor_level", &processor_level);
  m.def("philox", &philox);
  m.def("transition_sample", &sample);
  m.def("transition_log_prob", &log_prob);
  m.def("transition_log_prob_gradient", &log_prob_gradient);
  m.def("policy_loss", &policy_loss);
  m.def("policy_loss_gradient", &policy_loss_gradient);
}
