#pragma once

#include "../transition/cuda.cuh"
#include "call.h"

namespace dgf {

constexpr int kTermLanes = 32;

template <typename S>
struct LossBlock {
  BlockSum<3> sum;
  S row[kColumns];
  SampleTerms terms[kTermLanes];
  bool last;
};

// The three squares of one window: x' - mean, v - v_ref, mean - mean_old.
template <int W, typename S>
DGF_HD void loss_window(const PolicyLossCall<S>& p, const S* row, int64_t b, int64_t begin, S* sums) {
  const TransitionCall& call = p.transition;
  const bool pulled = p.reference.present();
  StepSource<S, W> in;
  Source<S, W> next_in, other_in;
  in.fetch(call, b, begin);
  next_in.fetch(call.next, b, begin);
  if (pulled) other_in.fetch(p.reference, b, begin);
  S x[W], v[W], drift[W], denoised[W], value[W];
  DGF_UNROLL
  for (int part = 0; part < kParts<W>; ++part) {
    in.take(call, part, x, v);
    next_in.take(call.next, part, value);
    difference_of(call, row, x, v, value, W, drift, denoised, S(1), value);
    add_squares<W>(value, sums[0]);
    if (!pulled) continue;
    other_in.take(p.reference, part, value);
    for (int i = 0; i < W; ++i) value[i] = v[i] - value[i];
    add_squares<W>(value, sums[1]);
  }
  if (!p.ratio_norm) return;
  // A loop of its own: with one operand more at once, registers would spill.
  other_in.fetch(p.old_output, b, begin);
  DGF_UNROLL
  for (int part = 0; part < kParts<W>; ++part) {
    S old_mean[W];
    in.take(call, part, x, v);
    other_in.take(p.old_output, part, value);
    mean_of(call, row, x, value, W, drift, denoised, old_mean);
    mean_of(call, row, x, v, W, drift, denoised, value);
    for (int i = 0; i < W; ++i) value[i] -= old_mean[i];
    add_squares<W>(value, sums[2]);
  }
}

// Where the terms of each sample wait for the block that finishes the batch.
template <typename S>
DGF_HD double* terms_of(const PolicyLossCall<S>& p, const Workspace& w, int64_t b) {
  const TransitionCall& call = p.transition;
  return w.scratch + call.batch * tile_count(call.numel) * 3 + b * (kMetrics + 1);
}

// Forward in one launch: the block that finishes a sample writes its outputs, the one that finishes the last sample
// writes the loss and the metrics.
template <typename S>
DGF_HD void policy_loss_block(const PolicyLossCall<S>& p, int64_t unit, bool packets, const Workspace& w,
                              const PolicyLossOutputs<S>& out, LossBlock<S>& s) {
  const TransitionCall& call = p.transition;
  const int64_t tiles = tile_count(call.numel), b = unit / tiles, tile = unit % tiles;
  share_row(call, b, s.row);
  for_lanes([&](int lane) {
    S sums[3] = {};
    for_windows<S>(call.numel, tile, lane, packets,
                   [&](auto width, int64_t begin) { loss_window<decltype(width)::value>(p, s.row, b, begin, sums); });
    for (int k = 0; k < 3; ++k) s.sum.lane[k][lane] = static_cast<double>(sums[k]);
  });
  if (!sum_sample(s.sum, w, b, tile, tiles)) return;
  for_lanes([&](int lane) {
    if (lane != 0) return;
    const double numel = static_cast<double>(call.numel);
    const MeanSquares mean_square = {s.sum.total[0] / numel, s.sum.total[1] / numel, s.sum.total[2] / numel};
    const SampleTerms terms = sample_terms(p, s.row, b, mean_square, out);
    double* target = terms_of(p, w, b);
    target[0] = terms.loss;
    for (int m = 0; m < kMetrics; ++m) target[m + 1] = terms.metrics[m];
    s.last = last_of(w.ticket + call.batch, call.batch);
  });
  if (!s.last) return;
  for_lanes([&](int lane) {
    if (lane >= kTermLanes) return;
    SampleTerms sum = {};
    for (int64_t i = lane; i < call.batch; i += kTermLanes) {
      const double* source = terms_of(p, w, i);
      SampleTerms terms;
      terms.loss = read_shared_result(source);
      for (int m = 0; m < kMetrics; ++m) terms.metrics[m] = read_shared_result(source + m + 1);
      add_terms(sum, terms);
    }
    s.terms[lane] = sum;
  });
  for_lanes([&](int lane) {
    if (lane != 0) return;
    SampleTerms sum = s.terms[0];
    for (int i = 1; i < kTermLanes; ++i) add_terms(sum, s.terms[i]);
    write_loss(p, sum, out);
  });
}

template <typename S>
bool moves_in_packets(const PolicyLossCall<S>& p) {
  const int64_t batch = p.transition.batch;
  return step_moves_in_packets(p.transition) && moves_in_packets(p.reference, batch) &&
         moves_in_packets(p.old_output, batch);
}

#if defined(__CUDACC__)

template <typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    policy_loss_kernel(const __grid_constant__ PolicyLossCall<S> p, bool packets, const Workspace w,
                       const __grid_constant__ PolicyLossOutputs<S> out) {
  __shared__ LossBlock<S> s;
  policy_loss_block(p, blockIdx.x, packets, w, out, s);
}

#endif

}  // namespace dgf
