#pragma once

// What both modules make of the Python side's arguments: tuples of addresses, sizes and strides. An address that is
// missing, or sizes that do not make up a sample, would be followed all the same, and loops over them need not end.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../kernels/policy_loss/call.h"

namespace dgf {

namespace py = pybind11;

[[noreturn]] inline void refuse(const char* name, const std::string& got, const std::string& want) {
  throw std::invalid_argument(std::string(name) + ": got " + got + ", want " + want);
}

inline int64_t at_least_one(const char* name, int64_t value) {
  if (value < 1) refuse(name, std::to_string(value), "at least 1");
  return value;
}

[[noreturn]] inline void refuse_step(const TransitionCall& call, int64_t row) {
  throw std::invalid_argument("step: got " + std::to_string(row) + ", the table has rows 0 to " +
                              std::to_string(call.table_rows - 1));
}

// The tuple `given`, of one of two lengths.
inline py::tuple tuple_of(const char* name, const py::object& given, size_t length, size_t other) {
  if (given.is_none()) refuse(name, "None", "a tensor");
  if (!py::isinstance<py::tuple>(given)) refuse(name, py::str(py::type::of(given)), "a tuple");
  const py::tuple t = py::reinterpret_borrow<py::tuple>(given);
  if (t.size() != length && t.size() != other)
    refuse(name, std::to_string(t.size()) + " values", std::to_string(length) + " or " + std::to_string(other));
  return t;
}

template <typename T>
T* optional_pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
T* pointer(const char* name, uintptr_t address) {
  if (address == 0) refuse(name, "no address", "a tensor's");
  return optional_pointer<T>(address);
}

// (address, dtype code, batch stride[, sizes, strides]); without sizes each sample is one contiguous run.
inline Operand operand(const char* name, const py::object& given, int64_t numel) {
  const py::tuple t = tuple_of(name, given, 3, 5);
  Operand out;
  out.data = pointer<void>(name, t[0].cast<uintptr_t>());
  const int code = t[1].cast<int>();
  if (code < 0 || code > static_cast<int>(DType::f16)) refuse(name, "dtype " + std::to_string(code), "0 to 3");
  out.dtype = static_cast<DType>(code);
  out.batch_stride = t[2].cast<int64_t>();
  if (t.size() == 3) {
    out.ndim = 1;
    out.size[0] = numel;
    out.stride[0] = 1;
    return out;
  }
  const py::tuple sizes = t[3], strides = t[4];
  if (sizes.size() > kMaxDims || strides.size() != sizes.size())
    refuse(name, std::to_string(sizes.size()) + " sizes and " + std::to_string(strides.size()) + " strides",
           "as many of both, at most 8");
  out.ndim = static_cast<int>(sizes.size());
  int64_t count = 1;
  for (int d = 0; d < out.ndim; ++d) {
    out.size[d] = at_least_one(name, sizes[d].cast<int64_t>());
    out.stride[d] = strides[d].cast<int64_t>();
    if (out.size[d] > numel / count) refuse(name, "more elements", std::to_string(numel) + " a sample");
    count *= out.size[d];
  }
  if (count != numel) refuse(name, std::to_string(count) + " elements", std::to_string(numel) + " a sample");
  out.collapse();
  return out;
}

inline Operand optional_operand(const char* name, const py::object& given, int64_t numel) {
  return given.is_none() ? Operand() : operand(name, given, numel);
}

// (latents, output, uncond, next, batch, numel, table, table rows, steps, step index, guidance, rounding,
// double precision, launch)
inline TransitionCall transition_call(const py::tuple& given) {
  const py::tuple t = tuple_of("transition", given, 14, 14);
  TransitionCall call;
  call.batch = at_least_one("batch", t[4].cast<int64_t>());
  call.numel = at_least_one("numel", t[5].cast<int64_t>());
  call.latents = operand("latents", t[0], call.numel);
  call.output = operand("model_output", t[1], call.numel);
  call.uncond = optional_operand("uncond_output", t[2], call.numel);
  call.next = operand("next_latents", t[3], call.numel);
  call.table = pointer<const void>("table", t[6].cast<uintptr_t>());
  call.table_rows = at_least_one("table", t[7].cast<int64_t>());
  call.step = optional_pointer<const int64_t>(t[8].cast<uintptr_t>());
  call.step_index = t[9].cast<int64_t>();
  if (!call.step && !call.in_table(call.step_index)) refuse_step(call, call.step_index);
  call.guidance_scale = t[10].cast<double>();
  call.reference_rounding = t[11].cast<bool>();
  return call;
}

inline bool double_precision(const py::tuple& t) { return t[12].cast<bool>(); }

inline NoiseSource noise_source(const py::object& given, const py::object& seed, uintptr_t sample_ids, int64_t numel) {
  NoiseSource source;
  source.given = optional_operand("noise", given, numel);
  source.seeded = !seed.is_none();
  if (source.seeded) source.seed = static_cast<uint64_t>(seed.cast<int64_t>());
  source.sample_ids = optional_pointer<const int64_t>(sample_ids);
  return source;
}

template <typename S>
PolicyLossCall<S> policy_loss_call(const TransitionCall& transition, const py::object& reference,
                                   const py::object& old_output, uintptr_t old_log_prob, uintptr_t advantages,
                                   uintptr_t weight, double clip_low, double clip_high, double advantage_clip,
                                   double kl_weight, bool ratio_norm) {
  PolicyLossCall<S> call;
  call.transition = transition;
  call.reference = optional_operand("reference_output", reference, call.transition.numel);
  call.old_output = optional_operand("old_output", old_output, call.transition.numel);
  call.old_log_prob = pointer<const S>("old_log_prob", old_log_prob);
  call.advantages = pointer<const S>("advantages", advantages);
  call.weight = optional_pointer<const S>(weight);
  call.clip_low = clip_low;
  call.clip_high = clip_high;
  call.advantage_clip = advantage_clip;
  call.kl_weight = kl_weight;
  call.ratio_norm = ratio_norm;
  if (ratio_norm && !call.old_output.present())
    refuse("old_output", "None with ratio_norm", "the model output of the rollout");
  if (kl_weight != 0.0 && !call.reference.present())
    refuse("reference_output", "None with a KL", "the reference model's output");
  return call;
}

template <typename S>
PolicyLossOutputs<S> policy_loss_outputs(const py::tuple& given) {
  const py::tuple t = tuple_of("out", given, 7, 7);
  const auto at = [&](size_t i) { return pointer<S>("out", t[i].cast<uintptr_t>()); };
  return {at(0), at(1), at(2), at(3), pointer<bool>("out", t[4].cast<uintptr_t>()), at(5), at(6)};
}

// Where the gradients go: by the model output, and by the unconditional one where there is one.
template <typename S>
TransitionGradient<S> gradient_outputs(const TransitionCall& call, const py::object& grad_output,
                                       const py::object& grad_uncond) {
  TransitionGradient<S> g;
  g.grad_output = operand("grad_output", grad_output, call.numel);
  if (call.uncond.present()) g.grad_uncond = operand("grad_uncond", grad_uncond, call.numel);
  return g;
}

template <typename S>
TransitionGradient<S> log_prob_gradient_terms(const TransitionCall& call, uintptr_t grad_log_prob,
                                              const py::object& grad_output, const py::object& grad_uncond) {
  TransitionGradient<S> g = gradient_outputs<S>(call, grad_output, grad_uncond);
  g.grad_log_prob = pointer<const S>("grad_log_prob", grad_log_prob);
  return g;
}

template <typename S>
TransitionGradient<S> policy_loss_gradient_terms(const TransitionCall& call, uintptr_t grad_loss, uintptr_t step_scale,
                                                 uintptr_t pull_scale, const py::object& pull,
                                                 const py::object& mean_output, const py::object& grad_output,
                                                 const py::object& grad_uncond) {
  TransitionGradient<S> g = gradient_outputs<S>(call, grad_output, grad_uncond);
  g.pull = optional_operand("pull", pull, call.numel);
  g.mean_output = optional_operand("mean_output", mean_output, call.numel);
  g.step_scale = pointer<const S>("step_scale", step_scale);
  g.pull_scale = pointer<const S>("pull_scale", pull_scale);
  g.grad_loss = pointer<const S>("grad_loss", grad_loss);
  return g;
}

}  // namespace dgf
