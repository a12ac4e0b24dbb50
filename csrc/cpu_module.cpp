// Bindings of the CPU kernels: raw pointers in, nothing allocated, no torch header. Python checks and allocates.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels/policy_loss/cpu.h"
#include "../kernels/transition/cpu.h"

namespace py = pybind11;

namespace {

// None, or (address, dtype code, batch stride[, sizes, strides]); without sizes each sample is one contiguous run.
dgf::Operand operand(const py::object& given, int64_t numel) {
  dgf::Operand out;
  if (given.is_none()) return out;
  const py::tuple t = py::reinterpret_borrow<py::tuple>(given);
  out.data = reinterpret_cast<void*>(t[0].cast<uintptr_t>());
  out.dtype = static_cast<dgf::DType>(t[1].cast<int>());
  out.batch_stride = t[2].cast<int64_t>();
  if (t.size() == 3) {
    out.ndim = 1;
    out.size[0] = numel;
    out.stride[0] = 1;
    return out;
  }
  const py::tuple sizes = t[3], strides = t[4];
  if (sizes.size() > dgf::kMaxDims) throw std::invalid_argument("a sample has at most 8 dimensions");
  out.ndim = static_cast<int>(sizes.size());
  for (int d = 0; d < out.ndim; ++d) {
    out.size[d] = sizes[d].cast<int64_t>();
    out.stride[d] = strides[d].cast<int64_t>();
  }
  out.collapse();
  return out;
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (latents, output, uncond, next, batch, numel, table, table rows, steps, step index, guidance, rounding, threads)
dgf::TransitionCall transition_call(const py::tuple& t) {
  dgf::TransitionCall call;
  call.batch = t[4].cast<int64_t>();
  call.numel = t[5].cast<int64_t>();
  call.latents = operand(t[0], call.numel);
  call.output = operand(t[1], call.numel);
  call.uncond = operand(t[2], call.numel);
  call.next = operand(t[3], call.numel);
  call.table = pointer<const void>(t[6].cast<uintptr_t>());
  call.table_rows = t[7].cast<int64_t>();
  call.step = pointer<const int64_t>(t[8].cast<uintptr_t>());
  call.step_index = t[9].cast<int64_t>();
  call.guidance_scale = t[10].cast<double>();
  call.reference_rounding = t[11].cast<bool>();
  call.threads = t[12].cast<int>();
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t row = call.row_index(b);
    if (row < 0 || row >= call.table_rows)
      throw std::invalid_argument("step: got " + std::to_string(row) + ", the table has rows 0 to " +
                                  std::to_string(call.table_rows - 1));
  }
  return call;
}

void sample(const py::tuple& transition, const py::object& noise, const py::object& seed, uintptr_t sample_ids,
            const py::object& denoised, uintptr_t log_prob, bool double_precision) {
  const dgf::TransitionCall call = transition_call(transition);
  dgf::NoiseSource source;
  source.given = operand(noise, call.numel);
  source.seeded = !seed.is_none();
  if (source.seeded) source.seed = static_cast<uint64_t>(seed.cast<int64_t>());
  source.sample_ids = pointer<const int64_t>(sample_ids);
  const dgf::Operand target = operand(denoised, call.numel);
  for (int64_t b = 0; b < call.batch && !source.seeded && !source.given.present(); ++b)
    if (double_precision ? call.row<double>(b)[dgf::kTau] != 0.0 : call.row<float>(b)[dgf::kTau] != 0.0f)
      throw std::invalid_argument("noise: got None and no seed for a step with noise, want one of them");
  py::gil_scoped_release unlocked;
  if (double_precision)
    dgf::transition_sample(call, source, target, pointer<double>(log_prob));
  else
    dgf::transition_sample(call, source, target, pointer<float>(log_prob));
}

void log_prob(const py::tuple& transition, uintptr_t out, bool double_precision) {
  const dgf::TransitionCall call = transition_call(transition);
  py::gil_scoped_release unlocked;
  if (double_precision)
    dgf::transition_log_prob(call, pointer<double>(out));
  else
    dgf::transition_log_prob(call, pointer<float>(out));
}

void log_prob_gradient(const py::tuple& transition, uintptr_t grad_log_prob, const py::object& grad_output,
                       const py::object& grad_uncond, bool double_precision) {
  const dgf::TransitionCall call = transition_call(transition);
  dgf::TransitionGradient g;
  g.grad_output = operand(grad_output, call.numel);
  g.grad_uncond = operand(grad_uncond, call.numel);
  py::gil_scoped_release unlocked;
  if (double_precision)
    dgf::transition_log_prob_gradient(call, pointer<const double>(grad_log_prob), g);
  else
    dgf::transition_log_prob_gradient(call, pointer<const float>(grad_log_prob), g);
}

template <typename S>
void loss_as(const dgf::PolicyLossCall& call, const py::tuple& out) {
  S* loss = pointer<S>(out[0].cast<uintptr_t>());
  S* scores = pointer<S>(out[1].cast<uintptr_t>());
  S* ratio = pointer<S>(out[2].cast<uintptr_t>());
  S* metrics = pointer<S>(out[3].cast<uintptr_t>());
  bool* has_grad = pointer<bool>(out[4].cast<uintptr_t>());
  double* step_scale = pointer<double>(out[5].cast<uintptr_t>());
  double* pull_scale = pointer<double>(out[6].cast<uintptr_t>());
  py::gil_scoped_release unlocked;
  dgf::policy_loss(call, loss, scores, ratio, metrics, has_grad, step_scale, pull_scale);
}

void policy_loss(const py::tuple& transition, const py::object& reference, const py::object& old_output,
                 uintptr_t old_log_prob, uintptr_t advantages, uintptr_t weight, double clip_range,
                 double advantage_clip, double kl_weight, bool ratio_norm, const py::tuple& out,
                 bool double_precision) {
  dgf::PolicyLossCall call;
  call.transition = transition_call(transition);
  call.reference = operand(reference, call.transition.numel);
  call.old_output = operand(old_output, call.transition.numel);
  call.old_log_prob = pointer<const void>(old_log_prob);
  call.advantages = pointer<const void>(advantages);
  call.weight = pointer<const void>(weight);
  call.clip_range = clip_range;
  call.advantage_clip = advantage_clip;
  call.kl_weight = kl_weight;
  call.ratio_norm = ratio_norm;
  if (ratio_norm && !call.old_output.present())
    throw std::invalid_argument("old_output: got None with ratio_norm, want the model output of the rollout");
  if (double_precision)
    loss_as<double>(call, out);
  else
    loss_as<float>(call, out);
}

// `grad_loss` is the incoming gradient, one number in the compute type.
void policy_loss_gradient(const py::tuple& transition, uintptr_t grad_loss, uintptr_t step_scale, uintptr_t pull_scale,
                          const py::object& pull, const py::object& mean_output, const py::object& grad_output,
                          const py::object& grad_uncond, bool double_precision) {
  const dgf::TransitionCall call = transition_call(transition);
  dgf::TransitionGradient g;
  g.grad_output = operand(grad_output, call.numel);
  g.grad_uncond = operand(grad_uncond, call.numel);
  g.pull = operand(pull, call.numel);
  g.mean_output = operand(mean_output, call.numel);
  const double factor = double_precision ? *pointer<const double>(grad_loss) : *pointer<const float>(grad_loss);
  const double *step = pointer<const double>(step_scale), *towards = pointer<const double>(pull_scale);
  std::vector<double> step_scaled(step, step + call.batch), pull_scaled(towards, towards + call.batch);
  for (double& value : step_scaled) value *= factor;
  for (double& value : pull_scaled) value *= factor;
  g.step_scale = step_scaled.data();
  if (g.pull.present()) g.pull_scale = pull_scaled.data();
  py::gil_scoped_release unlocked;
  if (double_precision)
    dgf::transition_gradient<double>(call, g);
  else
    dgf::transition_gradient<float>(call, g);
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
