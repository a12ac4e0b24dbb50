// Bindings of the CPU kernels: raw pointers in, nothing allocated, no torch header. Python checks and allocates; here
// only what must be there is looked for.
#include "../kernels/policy_loss/cpu.h"
#include "../kernels/transition/cpu.h"
#include "marshal.h"

namespace py = pybind11;

namespace {

dgf::TransitionCall checked_call(const py::tuple& t) {
  const dgf::TransitionCall call = dgf::transition_call(t);
  for (int64_t b = 0; call.step && b < call.batch; ++b)
    if (!call.in_table(call.step[b])) dgf::refuse_step(call, call.step[b]);
  return call;
}

int threads(const py::tuple& t) { return t[13].cast<int>(); }

// Calls as(value of the compute type), which parses and gives back what is then run without the interpreter's lock.
template <typename As>
void dispatch(const py::tuple& transition, As&& as) {
  const auto run = [&](auto type) {
    const auto kernel = as(type);
    const py::gil_scoped_release unlocked;
    kernel();
  };
  if (dgf::double_precision(transition))
    run(double{});
  else
    run(float{});
}

void sample(const py::tuple& transition, const py::object& noise, const py::object& seed, uintptr_t sample_ids,
            const py::object& denoised, uintptr_t log_prob) {
  const dgf::TransitionCall call = checked_call(transition);
  const dgf::NoiseSource source = dgf::noise_source(noise, seed, sample_ids, call.numel);
  const dgf::Operand clean = dgf::optional_operand("denoised", denoised, call.numel);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    using S = decltype(type);
    for (int64_t b = 0; b < call.batch && !source.seeded && !source.given.present(); ++b)
      if (call.row<S>(b)[dgf::kTau] != S(0))
        dgf::refuse("noise", "None and no seed for a step with noise", "one of them");
    S* out = dgf::pointer<S>("log_prob", log_prob);
    return [=, &call, &source] { dgf::transition_sample(call, source, clean, count, out); };
  });
}

void log_prob(const py::tuple& transition, uintptr_t log_prob) {
  const dgf::TransitionCall call = checked_call(transition);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    auto* out = dgf::pointer<decltype(type)>("log_prob", log_prob);
    return [=, &call] { dgf::transition_log_prob(call, count, out); };
  });
}

void log_prob_gradient(const py::tuple& transition, uintptr_t grad_log_prob, const py::object& grad_output,
                       const py::object& grad_uncond) {
  const dgf::TransitionCall call = checked_call(transition);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    const auto terms = dgf::log_prob_gradient_terms<decltype(type)>(call, grad_log_prob, grad_output, grad_uncond);
    return [=, &call] { dgf::transition_gradient(call, terms, count); };
  });
}

void policy_loss(const py::tuple& transition, const py::object& reference, const py::object& old_output,
                 uintptr_t old_log_prob, uintptr_t advantages, uintptr_t weight, double clip_low, double clip_high,
                 double advantage_clip, double kl_weight, bool ratio_norm, const py::tuple& out) {
  const dgf::TransitionCall step = checked_call(transition);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    using S = decltype(type);
    const auto call = dgf::policy_loss_call<S>(step, reference, old_output, old_log_prob, advantages, weight, clip_low,
                                               clip_high, advantage_clip, kl_weight, ratio_norm);
    for (int64_t b = 0; b < step.batch; ++b)
      if (step.row<S>(b)[dgf::kLogProbScale] == S(0) && call.weight_of(b) != 0.0)
        dgf::refuse("step", std::to_string(step.row_index(b)) + ", a row without noise", "one with noise, or weight 0");
    const auto outputs = dgf::policy_loss_outputs<S>(out);
    return [=] { dgf::policy_loss(call, count, outputs); };
  });
}

// `grad_loss` is the incoming gradient, one number in the compute type.
void policy_loss_gradient(const py::tuple& transition, uintptr_t grad_loss, uintptr_t step_scale, uintptr_t pull_scale,
                          const py::object& pull, const py::object& mean_output, const py::object& grad_output,
                          const py::object& grad_uncond) {
  const dgf::TransitionCall call = checked_call(transition);
  const int count = threads(transition);
  dispatch(transition, [&](auto type) {
    const auto terms = dgf::policy_loss_gradient_terms<decltype(type)>(call, grad_loss, step_scale, pull_scale, pull,
                                                                       mean_output, grad_output, grad_uncond);
    return [=, &call] { dgf::transition_gradient(call, terms, count); };
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
