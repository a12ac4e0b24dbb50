#pragma once

#include "../transition/call.h"
#include "math.h"

namespace dgf {

template <typename S>
struct PolicyLossCall {
  TransitionCall transition;
  Operand reference, old_output;                           // guided outputs of the reference model and of the rollout
  const S *old_log_prob = nullptr, *advantages = nullptr;  // [batch]
  const S* weight = nullptr;                               // [batch], or null: 1
  double clip_low = 0.0, clip_high = 0.0, advantage_clip = 0.0, kl_weight = 0.0;
  bool ratio_norm = false;

  DGF_HD double weight_of(int64_t b) const { return weight ? static_cast<double>(weight[b]) : 1.0; }
};

// Where the loss writes: loss [1], log_prob, ratio [batch], metrics [kMetrics], has_grad [batch], and step_scale and
// pull_scale [batch], the coefficients of TransitionGradient for a unit gradient of the loss.
template <typename S>
struct PolicyLossOutputs {
  S *loss, *log_prob, *ratio, *metrics;
  bool* has_grad;
  S *step_scale, *pull_scale;
};

// Mean squares of one sample: x' - mean, v - v_ref, mean - mean_old.
struct MeanSquares {
  double step, reference, old;
};

// What one sample adds to the loss and to the metrics.
struct SampleTerms {
  double loss;
  double metrics[kMetrics];
};

// Everything of one sample that follows from its mean squares: writes its outputs, returns what it adds.
template <typename S>
DGF_HD SampleTerms sample_terms(const PolicyLossCall<S>& p, const S* row, int64_t b, const MeanSquares& mean_square,
                                const PolicyLossOutputs<S>& out) {
  const double numel = static_cast<double>(p.transition.numel), batch = static_cast<double>(p.transition.batch);
  const double scale = row[kLogProbScale], coefficient = row[kB];
  const S log_prob = static_cast<S>(log_prob_of(scale, row[kLogProbConstant], mean_square.step));
  double log_ratio = static_cast<double>(log_prob) - static_cast<double>(p.old_log_prob[b]);
  const double weight = p.weight_of(b);
  double policy_weight = weight, log_ratio_slope = 1.0;
  if (p.ratio_norm) {
    log_ratio = (log_ratio - scale * mean_square.old) * row[kTau];
    log_ratio_slope = row[kTau];
    policy_weight = weight / row[kStepSize];
  }
  const double given = static_cast<double>(p.advantages[b]);
  const double bound = p.advantage_clip;
  const double advantage = given < -bound ? -bound : given > bound ? bound : given;
  PolicyTerm term = policy_term(log_ratio, advantage, p.clip_low, p.clip_high);
  // A row without noise has no ratio, one outside the table (NaN) has nothing: neither may pass for a right one.
  if (weight != 0.0 && !(scale < 0.0)) term = {NAN, NAN, NAN, false};
  const double kl = -scale * coefficient * coefficient * mean_square.reference;
  out.log_prob[b] = log_prob;
  out.ratio[b] = static_cast<S>(term.ratio);
  out.has_grad[b] = false;
  out.step_scale[b] = out.pull_scale[b] = S(0);
  SampleTerms terms = {};
  // Whatever a term of weight 0 holds, infinities included, it must not reach the others.
  if (weight == 0.0) return terms;
  const double step_scale =
      policy_weight / batch * term.grad_log_ratio * log_ratio_slope * gradient_scale(coefficient, scale, numel);
  const double pull_scale = weight / batch * p.kl_weight * -2.0 * scale * coefficient * coefficient / numel;
  out.step_scale[b] = static_cast<S>(step_scale);
  out.pull_scale[b] = static_cast<S>(pull_scale);
  out.has_grad[b] = step_scale != 0.0 || pull_scale != 0.0;
  terms.loss = policy_weight * term.loss + (p.kl_weight == 0.0 ? 0.0 : weight * p.kl_weight * kl);
  terms.metrics[kSamples] = 1.0;
  terms.metrics[kClipFraction] = term.clipped ? 1.0 : 0.0;
  terms.metrics[kAdvantageClipFraction] = advantage != given ? 1.0 : 0.0;
  terms.metrics[kRatioMean] = term.ratio;
  terms.metrics[kRatioMaxDev] = term.ratio > 1.0 ? term.ratio - 1.0 : 1.0 - term.ratio;
  terms.metrics[kApproxKl] = term.ratio - 1.0 - log_ratio;
  terms.metrics[kReferenceKl] = kl;
  terms.metrics[kPolicyLoss] = term.loss;
  return terms;
}

// Adds one sample's terms, or another partial sum.
DGF_HD void add_terms(SampleTerms& sum, const SampleTerms& terms) {
  sum.loss += terms.loss;
  for (int m = 0; m < kMetrics; ++m) {
    if (m == kRatioMaxDev) {
      // NaN, once seen, stays.
      const double largest = sum.metrics[m], other = terms.metrics[m];
      if (largest == largest && !(other <= largest)) sum.metrics[m] = other;
    } else {
      sum.metrics[m] += terms.metrics[m];
    }
  }
}

template <typename S>
DGF_HD void write_loss(const PolicyLossCall<S>& p, const SampleTerms& sum, const PolicyLossOutputs<S>& out) {
  out.loss[0] = static_cast<S>(sum.loss / static_cast<double>(p.transition.batch));
  const double samples = sum.metrics[kSamples] > 0.0 ? sum.metrics[kSamples] : 1.0;
  for (int m = 0; m < kMetrics; ++m)
    out.metrics[m] = static_cast<S>(m == kSamples || m == kRatioMaxDev ? sum.metrics[m] : sum.metrics[m] / samples);
}

}  // namespace dgf
