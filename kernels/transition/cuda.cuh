#pragma once

#include <cmath>

#include "../common/grid.h"
#include "../common/window.h"
#include "call.h"

namespace dgf {

// x and v of one window.
template <typename S, int W>
struct StepSource {
  Source<S, W> x, v, u;

  DGF_HD void fetch(const TransitionCall& call, int64_t b, int64_t begin) {
    x.fetch(call.latents, b, begin);
    v.fetch(call.output, b, begin);
    if (call.uncond.present()) u.fetch(call.uncond, b, begin);
  }

  // v after guidance.
  DGF_HD void take(const TransitionCall& call, int part, S* latents, S* velocity) const {
    x.take(call.latents, part, latents);
    v.take(call.output, part, velocity);
    if (!call.uncond.present()) return;
    S uncond[W];
    u.take(call.uncond, part, uncond);
    guide(call, velocity, uncond, W, velocity);
  }
};

// The row of sample b for all lanes. NaN where the index lies outside the table: the host cannot look without waiting,
// and a wrong row must not pass for a right one.
template <typename S>
DGF_HD void share_row(const TransitionCall& call, int64_t b, S* row) {
  for_lanes([&](int lane) {
    if (lane >= kColumns) return;
    row[lane] = call.in_table(call.row_index(b)) ? call.row<S>(b)[lane] : static_cast<S>(NAN);
  });
}

// One element after the other, so that the sum does not depend on the width.
template <int W, typename S>
DGF_HD void add_squares(const S* value, S& sum) {
  for (int i = 0; i < W; ++i) sum += value[i] * value[i];
}

// Philox normals of W elements from `begin` on; where they are no whole block, some of it is thrown away.
template <int W, typename S>
DGF_HD void draw(const NoiseKey& key, int64_t begin, S* eps) {
  const Normal4 z = normal4(key.seed, key.sample, key.step, static_cast<uint32_t>(begin / kPart));
  const float value[kPart] = {z.x, z.y, z.z, z.w};
  if (W == kPart) {
    for (int i = 0; i < W; ++i) eps[i] = static_cast<S>(value[i]);
    return;
  }
  const int place = static_cast<int>(begin % kPart);
  eps[0] = static_cast<S>(place == 0 ? value[0] : place == 1 ? value[1] : place == 2 ? value[2] : value[3]);
}

// x' and x0 of one window are written; (x' - mean)^2 is added to the sum.
template <int W, typename S>
DGF_HD void sample_window(const TransitionCall& call, const NoiseSource& noise, const Operand& clean, const S* row,
                          const NoiseKey& key, int64_t b, int64_t begin, S& sum) {
  const S tau = row[kTau];
  const bool noisy = tau != S(0), given = noisy && !noise.seeded && noise.given.present();
  StepSource<S, W> in;
  Source<S, W> noise_in;
  Sink<S, W> next_out, clean_out;
  in.fetch(call, b, begin);
  if (given) noise_in.fetch(noise.given, b, begin);
  DGF_UNROLL
  for (int part = 0; part < kParts<W>; ++part) {
    S x[W], v[W], drift[W], denoised[W], mean[W], next[W];
    in.take(call, part, x, v);
    mean_of(call, row, x, v, W, drift, denoised, mean);
    for (int i = 0; i < W; ++i) next[i] = mean[i];
    if (noisy) {
      S eps[W];
      // A row with noise, and none came: visible, as nothing can be raised here.
      for (int i = 0; i < W; ++i) eps[i] = static_cast<S>(NAN);
      if (noise.seeded)
        draw<W>(key, begin + part * kPart, eps);
      else if (given)
        noise_in.take(noise.given, part, eps);
      for (int i = 0; i < W; ++i) next[i] = mean[i] + tau * eps[i];
    }
    round_to(call.next.dtype, W, next);
    next_out.put(call.next, b, begin, part, next);
    if (clean.present()) {
      S x0[W];
      denoised_of(call, row, x, v, W, denoised, x0);
      clean_out.put(clean, b, begin, part, x0);
    }
    for (int i = 0; i < W; ++i) next[i] -= mean[i];
    add_squares<W>(next, sum);
  }
}

// (x' - mean)^2 of one window is added to the sum.
template <int W, typename S>
DGF_HD void score_window(const TransitionCall& call, const S* row, int64_t b, int64_t begin, S& sum) {
  StepSource<S, W> in;
  Source<S, W> next_in;
  in.fetch(call, b, begin);
  next_in.fetch(call.next, b, begin);
  DGF_UNROLL
  for (int part = 0; part < kParts<W>; ++part) {
    S x[W], v[W], drift[W], denoised[W], next[W];
    in.take(call, part, x, v);
    next_in.take(call.next, part, next);
    difference_of(call, row, x, v, next, W, drift, denoised, S(1), next);
    add_squares<W>(next, sum);
  }
}

template <typename S>
struct ScoreBlock {
  BlockSum<1> sum;
  S row[kColumns];
};

// One block of a sum over window(width, row, b, begin, sum); the block that finishes a sample writes its
// log-probability.
template <bool kWhole = false, typename S, typename Windows>
DGF_HD void score_block(const TransitionCall& call, int64_t unit, bool packets, const Workspace& w, S* log_prob,
                        ScoreBlock<S>& s, Windows&& window) {
  const int64_t tiles = tile_count(call.numel), b = unit / tiles, tile = unit % tiles;
  share_row(call, b, s.row);
  for_lanes([&](int lane) {
    S sum = S(0);
    for_windows<S, kWhole>(call.numel, tile, lane, packets,
                           [&](auto width, int64_t begin) { window(width, s.row, b, begin, sum); });
    s.sum.lane[0][lane] = static_cast<double>(sum);
  });
  if (!sum_sample(s.sum, w, b, tile, tiles)) return;
  for_lanes([&](int lane) {
    if (lane != 0) return;
    const double mean_square = s.sum.total[0] / static_cast<double>(call.numel);
    log_prob[b] = static_cast<S>(log_prob_of(s.row[kLogProbScale], s.row[kLogProbConstant], mean_square));
  });
}

template <bool kWhole = false, typename S>
DGF_HD void transition_sample_block(const TransitionCall& call, const NoiseSource& noise, const Operand& clean,
                                    int64_t unit, bool packets, const Workspace& w, S* log_prob, ScoreBlock<S>& s) {
  const int64_t sample = unit / tile_count(call.numel);
  const NoiseKey key = noise.key(sample, call.row_index(sample));
  score_block<kWhole>(call, unit, packets, w, log_prob, s,
                      [&](auto width, const S* row, int64_t b, int64_t begin, S& sum) {
                        sample_window<decltype(width)::value>(call, noise, clean, row, key, b, begin, sum);
                      });
}

// Dtypes of latents and outputs, and whether there is guidance: what of a step is usual enough to be compiled for. To
// ask in each window takes a fifth of the instructions, and half of the registers.
template <DType kState, DType kOutput, bool kGuided>
struct UsualStep {
  static bool is(const TransitionCall& call) {
    return call.latents.dtype == kState && call.next.dtype == kState && call.output.dtype == kOutput &&
           call.uncond.present() == kGuided && (!kGuided || call.uncond.dtype == kOutput);
  }

  // The numbers of transition_sample_block where `is` and `may_be_usual` hold: of copies whose fields the compiler
  // knows.
  static DGF_HD void sample_block(const TransitionCall& given, const NoiseSource& drawn, int64_t unit,
                                  const Workspace& w, float* log_prob, ScoreBlock<float>& s) {
    TransitionCall call = given;
    call.latents.dtype = call.next.dtype = kState;
    call.output.dtype = call.uncond.dtype = kOutput;
    if (!kGuided) call.uncond.data = nullptr;
    call.reference_rounding = false;
    NoiseSource noise = drawn;
    noise.given.data = nullptr;
    noise.seeded = true;
    transition_sample_block<true>(call, noise, Operand(), unit, true, w, log_prob, s);
  }
};

// Whether a step may be one of these: noise drawn, nothing else asked for, whole windows in packets.
inline bool may_be_usual(const TransitionCall& call, const NoiseSource& noise, const Operand& clean, bool packets) {
  return packets && noise.seeded && !clean.present() && !call.reference_rounding && call.numel % kWidth == 0;
}

// Calls with(UsualStep) where the step is one; false where it is none.
template <typename With>
bool if_usual(const TransitionCall& call, With&& with) {
  const auto tried = [&](auto... usual) { return ((decltype(usual)::is(call) && (with(usual), true)) || ...); };
  return tried(UsualStep<DType::f32, DType::bf16, false>(), UsualStep<DType::f32, DType::bf16, true>(),
               UsualStep<DType::f32, DType::f32, false>(), UsualStep<DType::f32, DType::f32, true>(),
               UsualStep<DType::bf16, DType::bf16, false>(), UsualStep<DType::bf16, DType::bf16, true>());
}

template <typename S>
DGF_HD void transition_log_prob_block(const TransitionCall& call, int64_t unit, bool packets, const Workspace& w,
                                      S* log_prob, ScoreBlock<S>& s) {
  score_block(call, unit, packets, w, log_prob, s, [&](auto width, const S* row, int64_t b, int64_t begin, S& sum) {
    score_window<decltype(width)::value>(call, row, b, begin, sum);
  });
}

// dv of one window, and the chain rule of guidance.
template <int W, typename S>
DGF_HD void gradient_window(const TransitionCall& call, const TransitionGradient<S>& g, const S* row, S step_scale,
                            S pull_scale, int64_t b, int64_t begin) {
  // A clipped sample: its activations are not read.
  const bool steps = step_scale != S(0), pulls = pull_scale != S(0), replaced = steps && g.mean_output.present();
  StepSource<S, W> in;
  Source<S, W> next_in, mean_in, pull_in;
  if (steps || pulls) in.fetch(call, b, begin);
  if (steps) next_in.fetch(call.next, b, begin);
  if (replaced) mean_in.fetch(g.mean_output, b, begin);
  if (pulls) pull_in.fetch(g.pull, b, begin);
  Sink<S, W> output_out, uncond_out;
  DGF_UNROLL
  for (int part = 0; part < kParts<W>; ++part) {
    S grad[W] = {};
    if (steps || pulls) {
      S x[W], v[W];
      in.take(call, part, x, v);
      if (steps) {
        S through[W], drift[W], denoised[W];
        for (int i = 0; i < W; ++i) through[i] = v[i];
        if (replaced) mean_in.take(g.mean_output, part, through);
        next_in.take(call.next, part, grad);
        difference_of(call, row, x, through, grad, W, drift, denoised, step_scale, grad);
      }
      if (pulls) {
        S pull[W];
        pull_in.take(g.pull, part, pull);
        for (int i = 0; i < W; ++i) grad[i] += pull_scale * (v[i] - pull[i]);
      }
    }
    if (call.uncond.present()) {
      const S scale = static_cast<S>(call.guidance_scale);
      S by_uncond[W];
      for (int i = 0; i < W; ++i) by_uncond[i] = (S(1) - scale) * grad[i];
      for (int i = 0; i < W; ++i) grad[i] = scale * grad[i];
      uncond_out.put(g.grad_uncond, b, begin, part, by_uncond);
    }
    output_out.put(g.grad_output, b, begin, part, grad);
  }
}

template <typename S>
DGF_HD void transition_gradient_block(const TransitionCall& call, const TransitionGradient<S>& g, int64_t unit,
                                      bool packets, S* row) {
  const int64_t tiles = tile_count(call.numel), b = unit / tiles, tile = unit % tiles;
  share_row(call, b, row);
  for_lanes([&](int lane) {
    const S step_scale = g.step_coefficient(b, row, call.numel), pull_scale = g.pull_coefficient(b);
    for_windows<S>(call.numel, tile, lane, packets, [&](auto width, int64_t begin) {
      gradient_window<decltype(width)::value>(call, g, row, step_scale, pull_scale, b, begin);
    });
  });
}

// Doubles of scratch that a launch over this batch needs, whatever the op.
inline int64_t scratch_size(int64_t batch, int64_t numel) { return batch * (tile_count(numel) * 3 + 9); }

inline bool step_moves_in_packets(const TransitionCall& call) {
  return moves_in_packets(call.latents, call.batch) && moves_in_packets(call.output, call.batch) &&
         moves_in_packets(call.uncond, call.batch) && moves_in_packets(call.next, call.batch);
}

inline bool moves_in_packets(const TransitionCall& call, const NoiseSource& noise, const Operand& clean) {
  return step_moves_in_packets(call) && moves_in_packets(noise.given, call.batch) &&
         moves_in_packets(clean, call.batch);
}

template <typename S>
bool moves_in_packets(const TransitionCall& call, const TransitionGradient<S>& g) {
  return step_moves_in_packets(call) && moves_in_packets(g.grad_output, call.batch) &&
         moves_in_packets(g.grad_uncond, call.batch) && moves_in_packets(g.pull, call.batch) &&
         moves_in_packets(g.mean_output, call.batch);
}

#if defined(__CUDACC__)

template <typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    transition_sample_kernel(const __grid_constant__ TransitionCall call, const __grid_constant__ NoiseSource noise,
                             const __grid_constant__ Operand clean, bool packets, const Workspace w, S* log_prob) {
  __shared__ ScoreBlock<S> s;
  transition_sample_block(call, noise, clean, blockIdx.x, packets, w, log_prob, s);
}

template <typename Usual>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    usual_sample_kernel(const __grid_constant__ TransitionCall call, const __grid_constant__ NoiseSource noise,
                        const Workspace w, float* log_prob) {
  __shared__ ScoreBlock<float> s;
  Usual::sample_block(call, noise, blockIdx.x, w, log_prob, s);
}

template <typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    transition_log_prob_kernel(const __grid_constant__ TransitionCall call, bool packets, const Workspace w,
                               S* log_prob) {
  __shared__ ScoreBlock<S> s;
  transition_log_prob_block(call, blockIdx.x, packets, w, log_prob, s);
}

template <typename S>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    transition_gradient_kernel(const __grid_constant__ TransitionCall call,
                               const __grid_constant__ TransitionGradient<S> g, bool packets) {
  __shared__ S row[kColumns];
  transition_gradient_block(call, g, blockIdx.x, packets, row);
}

#endif

}  // namespace dgf
