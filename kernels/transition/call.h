#pragma once

#include <cstdint>

#include "../common/operand.h"
#include "math.h"

namespace dgf {

// Where a transition's numbers are: shared by sampling, scoring, the loss and their backward.
struct TransitionCall {
  int64_t batch = 0;
  int64_t numel = 0;
  Operand latents, output, uncond;
  Operand next;  // written by sampling, read by everything else
  const void* table = nullptr;
  int64_t table_rows = 0;
  const int64_t* step = nullptr;  // per sample, or null: step_index for all
  int64_t step_index = 0;
  double guidance_scale = 1.0;
  bool reference_rounding = false;

  DGF_HD int64_t row_index(int64_t b) const { return step ? step[b] : step_index; }
  DGF_HD bool in_table(int64_t row) const { return row >= 0 && row < table_rows; }

  template <typename S>
  DGF_HD const S* row(int64_t b) const {
    return static_cast<const S*>(table) + row_index(b) * kColumns;
  }
};

// What the normals of one sample at one step are keyed by.
struct NoiseKey {
  uint64_t seed, sample;
  uint32_t step;
};

struct NoiseSource {
  Operand given;
  bool seeded = false;
  uint64_t seed = 0;
  const int64_t* sample_ids = nullptr;  // null: 0 .. batch - 1

  DGF_HD NoiseKey key(int64_t b, int64_t step) const {
    return {seed, static_cast<uint64_t>(sample_ids ? sample_ids[b] : b), static_cast<uint32_t>(step)};
  }
};

// The gradient of any loss that sees v through the step and, optionally, through a pull towards another output:
// dv = step_scale[b] (x' - mean) + pull_scale[b] (v - pull). `mean_output` replaces v inside the mean where given.
template <typename S>
struct TransitionGradient {
  Operand grad_output, grad_uncond, pull, mean_output;
  const S* step_scale = nullptr;     // [batch]
  const S* pull_scale = nullptr;     // [batch], with `pull` only
  const S* grad_log_prob = nullptr;  // [batch]: given instead of `step_scale`
  const S* grad_loss = nullptr;      // one number that multiplies both scales, or null: 1

  DGF_HD S step_coefficient(int64_t b, const S* row, int64_t numel) const {
    if (grad_log_prob) {
      const double slope = gradient_scale(row[kB], row[kLogProbScale], static_cast<double>(numel));
      return static_cast<S>(static_cast<double>(grad_log_prob[b]) * slope);
    }
    return scaled(step_scale[b]);
  }

  DGF_HD S pull_coefficient(int64_t b) const { return pull.present() ? scaled(pull_scale[b]) : S(0); }

 private:
  DGF_HD S scaled(S scale) const { return grad_loss ? scale * grad_loss[0] : scale; }
};

// v after guidance.
template <typename S>
DGF_HD void guide(const TransitionCall& call, const S* cond, const S* uncond, int64_t n, S* velocity) {
  const S scale = static_cast<S>(call.guidance_scale);
  for (int64_t i = 0; i < n; ++i) velocity[i] = guided(cond[i], uncond[i], scale);
}

// The mean of the step; with reference rounding also its two rounded products, for which there must be room.
template <typename S>
DGF_HD void mean_of(const TransitionCall& call, const S* row, const S* x, const S* v, int64_t n, S* drift, S* denoised,
                    S* mean) {
  if (!call.reference_rounding) {
    const S a = row[kA], b = row[kB];
    for (int64_t i = 0; i < n; ++i) mean[i] = affine(a, x[i], b, v[i]);
    return;
  }
  // After guidance the peers hold float32, so only a bare model output rounds its products.
  const DType products = call.uncond.present() ? DType::f64 : call.output.dtype;
  const S drift_factor = row[kDrift], q = row[kQ];
  for (int64_t i = 0; i < n; ++i) drift[i] = drift_factor * v[i];
  for (int64_t i = 0; i < n; ++i) denoised[i] = q * v[i];
  round_to(products, n, drift);
  round_to(products, n, denoised);
  for (int64_t i = 0; i < n; ++i) mean[i] = mean_from_products(row, x[i], drift[i], denoised[i]);
}

// The estimate of x0; with reference rounding from the rounded product that `mean_of` left.
template <typename S>
DGF_HD void denoised_of(const TransitionCall& call, const S* row, const S* x, const S* v, int64_t n, const S* product,
                        S* out) {
  const S p = row[kP], q = row[kQ];
  if (call.reference_rounding)
    for (int64_t i = 0; i < n; ++i) out[i] = p * x[i] + product[i];
  else
    for (int64_t i = 0; i < n; ++i) out[i] = affine(p, x[i], q, v[i]);
}

// scale (x' - mean), in one loop where it can be: three inputs stream better at once than one after another.
template <typename S>
DGF_HD void difference_of(const TransitionCall& call, const S* row, const S* x, const S* v, const S* next, int64_t n,
                          S* drift, S* denoised, S scale, S* out) {
  if (!call.reference_rounding) {
    const S a = row[kA], b = row[kB];
    for (int64_t i = 0; i < n; ++i) out[i] = scale * (next[i] - affine(a, x[i], b, v[i]));
    return;
  }
  S* mean = drift;
  mean_of(call, row, x, v, n, drift, denoised, mean);
  for (int64_t i = 0; i < n; ++i) out[i] = scale * (next[i] - mean[i]);
}

}  // namespace dgf
