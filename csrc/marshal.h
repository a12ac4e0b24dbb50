#pragma once

// What both modules make of the Python side's arguments: tuples of addresses, sizes and strides.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../kernels/policy_loss/call.h"

namespace dgf {

namespace py = pybind11;

// None, or (address, dtype code, batch stride[, sizes, strides]); without sizes each sample is one contiguous run.
inline Operand operand(const py::object& given, int64_t numel) {
  Operand out;
  if (given.is_none()) return out;
  const py::tuple t = py::reinterpret_borrow<py::tuple>(given);
  out.data = reinterpret_cast<void*>(t[0].cast<uintptr_t>());
  out.dtype = static_cast<DType>(t[1].cast<int>());
  out.batch_stride = t[2].cast<int64_t>();
  if (t.size() == 3) {
    out.ndim = 1;
    out.size[0] = numel;
    out.stride[0] = 1;
    return out;
  }
  const py::tuple sizes = t[3], strides = t[4];
  if (sizes.size() > kMaxDims) throw std::invalid_argument("a sample has at most 8 dimensions");
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

// (latents, output, uncond, next, batch, numel, table, table rows, steps, step index, guidance, rounding,
// double precision, launch)
inline TransitionCall transition_call(const py::tuple& t) {
  TransitionCall call;
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
  return call;
}

inline bool double_precision(const py::tuple& t) { return t[12].cast<bool>(); }

inline NoiseSource noise_source(const py::object& given, const py::object& seed, uintptr_t sample_ids, int64_t numel) {
  NoiseSource source;
  source.given = operand(given, numel);
  source.seeded = !seed.is_none();
  if (source.seeded) source.seed = static_cast<uint64_t>(seed.cast<int64_t>());
  source.sample_ids = pointer<const int64_t>(sample_ids);
  return source;
}

template <typename S>
PolicyLossCall<S> policy_loss_call(const py::tuple& transition, const py::object& reference,
                                   const py::object& old_output, uintptr_t old_log_prob, uintptr_t advantages,
                                   uintptr_t weight, double clip_range, double advantage_clip, double kl_weight,
                                   bool ratio_norm) {
  PolicyLossCall<S> call;
  call.transition = transition_call(transition);
  call.reference = operand(reference, call.transition.numel);
  call.old_output = operand(old_output, call.transition.numel);
  call.old_log_prob = pointer<const S>(old_log_prob);
  call.advantages = pointer<const S>(advantages);
  call.weight = pointer<const S>(weight);
  call.clip_range = clip_range;
  call.advantage_clip = advantage_clip;
  call.kl_weight = kl_weight;
  call.ratio_norm = ratio_norm;
  if (ratio_norm && !call.old_output.present())
    throw std::invalid_argument("old_output: got None with ratio_norm, want the model output of the rollout");
  return call;
}

template <typename S>
PolicyLossOutputs<S> policy_loss_outputs(const py::tuple& t) {
  const auto at = [&](int i) { return pointer<S>(t[static_cast<size_t>(i)].cast<uintptr_t>()); };
  return {at(0), at(1), at(2), at(3), pointer<bool>(t[4].cast<uintptr_t>()), at(5), at(6)};
}

template <typename S>
TransitionGradient<S> log_prob_gradient_terms(uintptr_t grad_log_prob, const py::object& grad_output,
                                              const py::object& grad_uncond, int64_t numel) {
  TransitionGradient<S> g;
  g.grad_output = operand(grad_output, numel);
  g.grad_uncond = operand(grad_uncond, numel);
  g.grad_log_prob = pointer<const S>(grad_log_prob);
  return g;
}

template <typename S>
TransitionGradient<S> policy_loss_gradient_terms(uintptr_t grad_loss, uintptr_t step_scale, uintptr_t pull_scale,
                                                 const py::object& pull, const py::object& mean_output,
                                                 const py::object& grad_output, const py::object& grad_uncond,
                                                 int64_t numel) {
  TransitionGradient<S> g;
  g.grad_output = operand(grad_output, numel);
  g.grad_uncond = operand(grad_uncond, numel);
  g.pull = operand(pull, numel);
  g.mean_output = operand(mean_output, numel);
  g.step_scale = pointer<const S>(step_scale);
  g.pull_scale = pointer<const S>(pull_scale);
  g.grad_loss = pointer<const S>(grad_loss);
  return g;
}

}  // namespace dgf
