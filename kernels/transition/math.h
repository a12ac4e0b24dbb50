#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace dgf {

// Columns of a packed table row; `dancegrpo_fast/transitions/` writes them in this order.
enum Column : int {
  kA = 0,
  kB = 1,
  kTau = 2,
  kP = 3,
  kQ = 4,
  kLogProbScale = 5,  // log_prob = scale * mean(d^2) + constant; both 0 where tau is 0
  kLogProbConstant = 6,
  kDrift = 7,  // with reference rounding: b v = drift_weight r(drift v) + denoised_weight r(q v)
  kDriftWeight = 8,
  kDenoisedWeight = 9,
  kStepSize = 10,  // -dt of the flow, 0 where the sampler has none
  kColumns = 11
};

template <typename S>
DGF_HD S guided(S cond, S uncond, S scale) {
  return uncond + scale * (cond - uncond);
}

template <typename S>
DGF_HD S affine(S first, S x, S second, S v) {
  return first * x + second * v;
}

// mean of the Gaussian step, with the two products of the peers already rounded to the model's dtype
template <typename S>
DGF_HD S mean_from_products(const S* row, S x, S drift_product, S denoised_product) {
  return row[kA] * x + row[kDriftWeight] * drift_product + row[kDenoisedWeight] * denoised_product;
}

// A row without noise scores its constant, 0, however large the difference is.
DGF_HD double log_prob_of(double scale, double constant, double mean_square) {
  return scale == 0.0 ? constant : scale * mean_square + constant;
}

// d log_prob / d v = gradient_scale * (next - mean), before the incoming gradient
DGF_HD double gradient_scale(double b, double log_prob_scale, double numel) {
  return -2.0 * log_prob_scale * b / numel;
}

}  // namespace dgf
