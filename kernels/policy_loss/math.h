#pragma once

#include <cmath>

#include "../common/host_device.h"

namespace dgf {

// Order of the metrics vector; `dancegrpo_fast/ops/policy_loss.py` names them in this order.
enum Metric : int {
  kSamples = 0,
  kClipFraction = 1,
  kAdvantageClipFraction = 2,
  kRatioMean = 3,
  kRatioMaxDev = 4,
  kApproxKl = 5,
  kReferenceKl = 6,
  kPolicyLoss = 7,
  kMetrics = 8
};

struct PolicyTerm {
  double ratio, loss, grad_log_ratio;
  bool clipped;
};

// max(-A rho, -A clip(rho)) for one sample, and its derivative by log rho.
DGF_HD PolicyTerm policy_term(double log_ratio, double advantage, double clip_low, double clip_high) {
  PolicyTerm out;
  out.ratio = exp(log_ratio);
  const double low = 1.0 - clip_low, high = 1.0 + clip_high;
  const double bounded = out.ratio < low ? low : out.ratio > high ? high : out.ratio;
  // An advantage of 0 gives 0 even where the ratio has overflown.
  const double unclipped_loss = advantage == 0.0 ? 0.0 : -advantage * out.ratio;
  const double clipped_loss = -advantage * bounded;
  out.clipped = clipped_loss > unclipped_loss;
  out.loss = out.clipped ? clipped_loss : unclipped_loss;
  out.grad_log_ratio = out.clipped ? 0.0 : unclipped_loss;
  return out;
}

}  // namespace dgf
