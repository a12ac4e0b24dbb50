#pragma once

#include "../transition/cpu.h"
#include "math.h"

namespace dgf {

struct PolicyLossCall {
  TransitionCall transition;
  Operand reference, old_output;  // guided outputs of the reference model and of the rollout
  const void* old_log_prob = nullptr;
  const void* advantages = nullptr;
  const void* weight = nullptr;  // per sample
  double clip_range = 0.0, advantage_clip = 0.0, kl_weight = 0.0;
  bool ratio_norm = false;
};

// Outputs: loss [1], log_prob, ratio [batch], metrics [kMetrics] in S; has_grad [batch]; step_scale, pull_scale
// [batch], the coefficients of TransitionGradient for a unit gradient of the loss.
template <typename S>
void policy_loss(const PolicyLossCall& p, S* loss, S* log_prob, S* ratio, S* metrics, bool* has_grad,
                 double* step_scale, double* pull_scale) {
  const TransitionCall& call = p.transition;
  const int64_t blocks = block_count(call.numel);
  const size_t units = static_cast<size_t>(call.batch * blocks);
  std::vector<double> squares(units), reference_squares(units), mean_squares(units);
  ThreadPool::instance().run(call.batch * blocks, call.threads, [&](int64_t unit) {
    const int64_t b = unit / blocks;
    const S* row = call.row<S>(b);
    Scratch<S> s;
    LaneSum<S> sum, reference_sum, mean_sum;
    for_each_chunk(unit % blocks, call.numel, [&](int64_t begin, int64_t n) {
      load_inputs(call, b, begin, n, s);
      const S* next = load(call.next, b, begin, n, s.next);
      difference_of(call, row, s.x, s.v, next, n, s, S(1), s.extra);
      sum.add_squares(s.extra, n);
      if (p.reference.present()) {
        const S* reference = load(p.reference, b, begin, n, s.next);
        for (int64_t i = 0; i < n; ++i) s.extra[i] = s.v[i] - reference[i];
        reference_sum.add_squares(s.extra, n);
      }
      if (p.ratio_norm) {
        const S* old = load(p.old_output, b, begin, n, s.old_output);
        mean_of(call, row, s.x, s.v, n, s, s.mean);
        mean_of(call, row, s.x, old, n, s, s.next);
        for (int64_t i = 0; i < n; ++i) s.extra[i] = s.mean[i] - s.next[i];
        mean_sum.add_squares(s.extra, n);
      }
    });
    squares[static_cast<size_t>(unit)] = sum.total();
    reference_squares[static_cast<size_t>(unit)] = reference_sum.total();
    mean_squares[static_cast<size_t>(unit)] = mean_sum.total();
  });

  const double numel = static_cast<double>(call.numel), batch = static_cast<double>(call.batch);
  double total = 0.0, sums[kMetrics] = {};
  for (int64_t b = 0; b < call.batch; ++b) {
    const S* row = call.row<S>(b);
    const size_t first = static_cast<size_t>(b * blocks);
    const double scale = row[kLogProbScale], coefficient = row[kB];
    log_prob[b] =
        static_cast<S>(log_prob_of(scale, row[kLogProbConstant], ordered_sum(&squares[first], blocks) / numel));
    double log_ratio = static_cast<double>(log_prob[b]) - static_cast<double>(static_cast<const S*>(p.old_log_prob)[b]);
    const double weight = static_cast<double>(static_cast<const S*>(p.weight)[b]);
    double policy_weight = weight, log_ratio_slope = 1.0;
    if (p.ratio_norm) {
      log_ratio = (log_ratio - scale * (ordered_sum(&mean_squares[first], blocks) / numel)) * row[kTau];
      log_ratio_slope = row[kTau];
      policy_weight = weight / row[kStepSize];
    }
    const double given = static_cast<double>(static_cast<const S*>(p.advantages)[b]);
    const double bound = p.advantage_clip;
    const double advantage = given < -bound ? -bound : given > bound ? bound : given;
    const PolicyTerm term = policy_term(log_ratio, advantage, p.clip_range);
    const double kl = -scale * coefficient * coefficient * (ordered_sum(&reference_squares[first], blocks) / numel);
    ratio[b] = static_cast<S>(term.ratio);
    has_grad[b] = false;
    step_scale[b] = pull_scale[b] = 0.0;
    // Whatever a sample of weight 0 holds, infinities included, it must not reach the others.
    if (weight == 0.0) continue;
    total += policy_weight * term.loss + weight * p.kl_weight * kl;
    step_scale[b] =
        policy_weight / batch * term.grad_log_ratio * log_ratio_slope * gradient_scale(coefficient, scale, numel);
    pull_scale[b] = weight / batch * p.kl_weight * -2.0 * scale * coefficient * coefficient / numel;
    has_grad[b] = step_scale[b] != 0.0 || pull_scale[b] != 0.0;
    const double deviation = term.ratio > 1.0 ? term.ratio - 1.0 : 1.0 - term.ratio;
    sums[kSamples] += 1.0;
    sums[kClipFraction] += term.clipped ? 1.0 : 0.0;
    sums[kAdvantageClipFraction] += advantage != given ? 1.0 : 0.0;
    sums[kRatioMean] += term.ratio;
    // NaN, once seen, stays.
    if (!std::isnan(sums[kRatioMaxDev]) && !(deviation <= sums[kRatioMaxDev])) sums[kRatioMaxDev] = deviation;
    sums[kApproxKl] += term.ratio - 1.0 - log_ratio;
    sums[kReferenceKl] += kl;
    sums[kPolicyLoss] += term.loss;
  }
  loss[0] = static_cast<S>(total / batch);
  const double samples = sums[kSamples] > 0.0 ? sums[kSamples] : 1.0;
  for (int m = 0; m < kMetrics; ++m)
    metrics[m] = static_cast<S>(m == kSamples || m == kRatioMaxDev ? sums[m] : sums[m] / samples);
}

}  // namespace dgf
