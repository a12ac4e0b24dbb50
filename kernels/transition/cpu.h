#pragma once

#include <vector>

#include "../common/operand.h"
#include "../common/philox_cpu.h"
#include "../common/reduce.h"
#include "../common/thread_pool.h"
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
  int threads = 1;

  int64_t row_index(int64_t b) const { return step ? step[b] : step_index; }

  template <typename S>
  const S* row(int64_t b) const {
    return static_cast<const S*>(table) + row_index(b) * kColumns;
  }
};

struct NoiseSource {
  Operand given;
  bool seeded = false;
  uint64_t seed = 0;
  const int64_t* sample_ids = nullptr;  // null: 0 .. batch - 1

  uint64_t id(int64_t b) const { return static_cast<uint64_t>(sample_ids ? sample_ids[b] : b); }
};

// Philox normals of elements begin .. begin + n, at most a chunk; begin is a multiple of 4 and `out` has room for a
// chunk.
template <typename S>
void normals(const NoiseSource& noise, int64_t b, int64_t step, int64_t begin, int64_t n, S* out) {
  alignas(64) uint32_t radius[kChunk / 2], angle[kChunk / 2];
  alignas(64) float first[kChunk / 2], second[kChunk / 2];
  const int blocks = static_cast<int>((n + 3) / 4);
  philox_pairs(noise.seed, noise.id(b), static_cast<uint32_t>(step), static_cast<uint32_t>(begin / 4), blocks, radius,
               angle);
  for (int i = 0; i < 2 * blocks; ++i) box_muller(radius[i], angle[i], &first[i], &second[i]);
  for (int i = 0; i < 2 * blocks; ++i) {
    out[2 * i] = first[i];
    out[2 * i + 1] = second[i];
  }
}

template <typename S>
struct Scratch {
  alignas(64) S latents[kChunk], output[kChunk], uncond[kChunk], velocity[kChunk], mean[kChunk], next[kChunk];
  alignas(64) S extra[kChunk], drift[kChunk], denoised[kChunk], old_output[kChunk];
  const S *x, *v;
};

// Loads a chunk: x, and v after guidance.
template <typename S>
void load_inputs(const TransitionCall& call, int64_t b, int64_t begin, int64_t n, Scratch<S>& s) {
  s.x = load(call.latents, b, begin, n, s.latents);
  s.v = load(call.output, b, begin, n, s.output);
  if (call.uncond.present()) {
    const S* u = load(call.uncond, b, begin, n, s.uncond);
    const S scale = static_cast<S>(call.guidance_scale);
    for (int64_t i = 0; i < n; ++i) s.velocity[i] = guided(s.v[i], u[i], scale);
    s.v = s.velocity;
  }
}

template <typename S>
void mean_of(const TransitionCall& call, const S* row, const S* x, const S* v, int64_t n, Scratch<S>& s, S* mean) {
  if (!call.reference_rounding) {
    const S a = row[kA], bb = row[kB];
    for (int64_t i = 0; i < n; ++i) mean[i] = affine(a, x[i], bb, v[i]);
    return;
  }
  // After guidance the peers hold float32, so only a bare model output rounds its products.
  const DType products = call.uncond.present() ? DType::f64 : call.output.dtype;
  const S drift = row[kDrift], q = row[kQ];
  for (int64_t i = 0; i < n; ++i) s.drift[i] = drift * v[i];
  for (int64_t i = 0; i < n; ++i) s.denoised[i] = q * v[i];
  round_to(products, n, s.drift);
  round_to(products, n, s.denoised);
  for (int64_t i = 0; i < n; ++i) mean[i] = mean_from_products(row, x[i], s.drift[i], s.denoised[i]);
}

// scale (x' - mean), in one loop where it can be: three inputs stream better at once than one after another.
template <typename S>
void difference_of(const TransitionCall& call, const S* row, const S* x, const S* v, const S* next, int64_t n,
                   Scratch<S>& s, S scale, S* out) {
  if (!call.reference_rounding) {
    const S a = row[kA], bb = row[kB];
    for (int64_t i = 0; i < n; ++i) out[i] = scale * (next[i] - affine(a, x[i], bb, v[i]));
    return;
  }
  mean_of(call, row, x, v, n, s, s.mean);
  for (int64_t i = 0; i < n; ++i) out[i] = scale * (next[i] - s.mean[i]);
}

// x' = mean + tau eps rounded as stored, and the log-probability of what was stored.
template <typename S>
void transition_sample(const TransitionCall& call, const NoiseSource& noise, const Operand& denoised, S* log_prob) {
  const int64_t blocks = block_count(call.numel);
  std::vector<double> partial(static_cast<size_t>(call.batch * blocks));
  ThreadPool::instance().run(call.batch * blocks, call.threads, [&](int64_t unit) {
    const int64_t b = unit / blocks;
    const S* row = call.row<S>(b);
    const S tau = row[kTau];
    Scratch<S> s;
    LaneSum<S> sum;
    for_each_chunk(unit % blocks, call.numel, [&](int64_t begin, int64_t n) {
      load_inputs(call, b, begin, n, s);
      mean_of(call, row, s.x, s.v, n, s, s.mean);
      S* next = target(call.next, b, begin, s.next);
      if (tau == S(0)) {
        for (int64_t i = 0; i < n; ++i) next[i] = s.mean[i];
      } else {
        const S* eps = s.extra;
        if (noise.seeded)
          normals(noise, b, call.row_index(b), begin, n, s.extra);
        else
          eps = load(noise.given, b, begin, n, s.extra);
        for (int64_t i = 0; i < n; ++i) next[i] = s.mean[i] + tau * eps[i];
      }
      round_to(call.next.dtype, n, next);
      store(call.next, b, begin, n, next);
      for (int64_t i = 0; i < n; ++i) s.extra[i] = next[i] - s.mean[i];
      sum.add_squares(s.extra, n);
      if (denoised.present()) {
        const S p = row[kP], q = row[kQ];
        S* clean = target(denoised, b, begin, s.extra);
        if (call.reference_rounding)
          for (int64_t i = 0; i < n; ++i) clean[i] = p * s.x[i] + s.denoised[i];
        else
          for (int64_t i = 0; i < n; ++i) clean[i] = affine(p, s.x[i], q, s.v[i]);
        store(denoised, b, begin, n, clean);
      }
    });
    partial[static_cast<size_t>(unit)] = sum.total();
  });
  for (int64_t b = 0; b < call.batch; ++b) {
    const S* row = call.row<S>(b);
    const double mean_square = ordered_sum(&partial[static_cast<size_t>(b * blocks)], blocks) / call.numel;
    log_prob[b] = static_cast<S>(log_prob_of(row[kLogProbScale], row[kLogProbConstant], mean_square));
  }
}

template <typename S>
void transition_log_prob(const TransitionCall& call, S* log_prob) {
  const int64_t blocks = block_count(call.numel);
  std::vector<double> partial(static_cast<size_t>(call.batch * blocks));
  ThreadPool::instance().run(call.batch * blocks, call.threads, [&](int64_t unit) {
    const int64_t b = unit / blocks;
    const S* row = call.row<S>(b);
    Scratch<S> s;
    LaneSum<S> sum;
    for_each_chunk(unit % blocks, call.numel, [&](int64_t begin, int64_t n) {
      load_inputs(call, b, begin, n, s);
      const S* next = load(call.next, b, begin, n, s.next);
      difference_of(call, row, s.x, s.v, next, n, s, S(1), s.extra);
      sum.add_squares(s.extra, n);
    });
    partial[static_cast<size_t>(unit)] = sum.total();
  });
  for (int64_t b = 0; b < call.batch; ++b) {
    const S* row = call.row<S>(b);
    const double mean_square = ordered_sum(&partial[static_cast<size_t>(b * blocks)], blocks) / call.numel;
    log_prob[b] = static_cast<S>(log_prob_of(row[kLogProbScale], row[kLogProbConstant], mean_square));
  }
}

// The gradient of any loss that sees v through the step and, optionally, through a pull towards another output:
// dv = step_scale[b] (x' - mean) + pull_scale[b] (v - pull). `mean_output` replaces v inside the mean where given.
struct TransitionGradient {
  Operand grad_output, grad_uncond;
  const double* step_scale = nullptr;
  const double* pull_scale = nullptr;
  Operand pull, mean_output;
};

template <typename S>
void gradient_block(const TransitionCall& call, const TransitionGradient& g, int64_t b, int64_t block) {
  const S* row = call.row<S>(b);
  const S scale = static_cast<S>(call.guidance_scale);
  const S step_scale = static_cast<S>(g.step_scale[b]);
  const S pull_scale = g.pull_scale ? static_cast<S>(g.pull_scale[b]) : S(0);
  Scratch<S> s;
  for_each_chunk(block, call.numel, [&](int64_t begin, int64_t n) {
    S* grad = call.uncond.present() ? s.extra : target(g.grad_output, b, begin, s.extra);
    if (step_scale == S(0) && pull_scale == S(0)) {
      // A clipped sample: its activations are not read.
      for (int64_t i = 0; i < n; ++i) grad[i] = S(0);
    } else {
      load_inputs(call, b, begin, n, s);
      const S* v = g.mean_output.present() ? load(g.mean_output, b, begin, n, s.old_output) : s.v;
      if (step_scale != S(0)) {
        const S* next = load(call.next, b, begin, n, s.next);
        difference_of(call, row, s.x, v, next, n, s, step_scale, grad);
      } else {
        for (int64_t i = 0; i < n; ++i) grad[i] = S(0);
      }
      if (pull_scale != S(0)) {
        const S* pull = load(g.pull, b, begin, n, s.next);
        for (int64_t i = 0; i < n; ++i) grad[i] += pull_scale * (s.v[i] - pull[i]);
      }
    }
    if (!call.uncond.present()) {
      store(g.grad_output, b, begin, n, grad);
      return;
    }
    for (int64_t i = 0; i < n; ++i) s.mean[i] = scale * grad[i];
    store(g.grad_output, b, begin, n, s.mean);
    for (int64_t i = 0; i < n; ++i) s.mean[i] = (S(1) - scale) * grad[i];
    store(g.grad_uncond, b, begin, n, s.mean);
  });
}

template <typename S>
void transition_gradient(const TransitionCall& call, const TransitionGradient& g) {
  const int64_t blocks = block_count(call.numel);
  ThreadPool::instance().run(call.batch * blocks, call.threads,
                             [&](int64_t unit) { gradient_block<S>(call, g, unit / blocks, unit % blocks); });
}

// Gradient of sum(grad_log_prob * log_prob).
template <typename S>
void transition_log_prob_gradient(const TransitionCall& call, const S* grad_log_prob, TransitionGradient g) {
  std::vector<double> step_scale(static_cast<size_t>(call.batch));
  for (int64_t b = 0; b < call.batch; ++b) {
    const S* row = call.row<S>(b);
    step_scale[static_cast<size_t>(b)] =
        grad_log_prob[b] * gradient_scale(row[kB], row[kLogProbScale], static_cast<double>(call.numel));
  }
  g.step_scale = step_scale.data();
  transition_gradient<S>(call, g);
}

}  // namespace dgf
