#pragma once

#include <vector>

#include "../common/operand_cpu.h"
#include "../common/philox_cpu.h"
#include "../common/reduce.h"
#include "../common/thread_pool.h"
#include "call.h"

namespace dgf {

// Philox normals of elements begin .. begin + n, at most a chunk; begin is a multiple of 4 and `out` has room for a
// chunk.
template <typename S>
void normals(const NoiseKey& key, int64_t begin, int64_t n, S* out) {
  alignas(64) uint32_t radius[kChunk / 2], angle[kChunk / 2];
  alignas(64) float first[kChunk / 2], second[kChunk / 2];
  const int blocks = static_cast<int>((n + 3) / 4);
  philox_pairs(key.seed, key.sample, key.step, static_cast<uint32_t>(begin / 4), blocks, radius, angle);
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
    guide(call, s.v, u, n, s.velocity);
    s.v = s.velocity;
  }
}

// x' = mean + tau eps rounded as stored, and the log-probability of what was stored.
template <typename S>
void transition_sample(const TransitionCall& call, const NoiseSource& noise, const Operand& denoised, int threads,
                       S* log_prob) {
  const int64_t blocks = block_count(call.numel);
  std::vector<double> partial(static_cast<size_t>(call.batch * blocks));
  ThreadPool::instance().run(call.batch * blocks, threads, [&](int64_t unit) {
    const int64_t b = unit / blocks;
    const S* row = call.row<S>(b);
    const S tau = row[kTau];
    const NoiseKey key = noise.key(b, call.row_index(b));
    Scratch<S> s;
    LaneSum<S> sum;
    for_each_chunk(unit % blocks, call.numel, [&](int64_t begin, int64_t n) {
      load_inputs(call, b, begin, n, s);
      mean_of(call, row, s.x, s.v, n, s.drift, s.denoised, s.mean);
      S* next = target(call.next, b, begin, s.next);
      if (tau == S(0)) {
        for (int64_t i = 0; i < n; ++i) next[i] = s.mean[i];
      } else {
        const S* eps = s.extra;
        if (noise.seeded)
          normals(key, begin, n, s.extra);
        else
          eps = load(noise.given, b, begin, n, s.extra);
        for (int64_t i = 0; i < n; ++i) next[i] = s.mean[i] + tau * eps[i];
      }
      round_to(call.next.dtype, n, next);
      store(call.next, b, begin, n, next);
      for (int64_t i = 0; i < n; ++i) s.extra[i] = next[i] - s.mean[i];
      sum.add_squares(s.extra, n);
      if (denoised.present()) {
        S* clean = target(denoised, b, begin, s.extra);
        denoised_of(call, row, s.x, s.v, n, s.denoised, clean);
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
void transition_log_prob(const TransitionCall& call, int threads, S* log_prob) {
  const int64_t blocks = block_count(call.numel);
  std::vector<double> partial(static_cast<size_t>(call.batch * blocks));
  ThreadPool::instance().run(call.batch * blocks, threads, [&](int64_t unit) {
    const int64_t b = unit / blocks;
    const S* row = call.row<S>(b);
    Scratch<S> s;
    LaneSum<S> sum;
    for_each_chunk(unit % blocks, call.numel, [&](int64_t begin, int64_t n) {
      load_inputs(call, b, begin, n, s);
      const S* next = load(call.next, b, begin, n, s.next);
      difference_of(call, row, s.x, s.v, next, n, s.drift, s.denoised, S(1), s.extra);
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

template <typename S>
void gradient_block(const TransitionCall& call, const TransitionGradient<S>& g, int64_t b, int64_t block) {
  const S* row = call.row<S>(b);
  const S scale = static_cast<S>(call.guidance_scale);
  const S step_scale = g.step_coefficient(b, row, call.numel), pull_scale = g.pull_coefficient(b);
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
        difference_of(call, row, s.x, v, next, n, s.drift, s.denoised, step_scale, grad);
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
void transition_gradient(const TransitionCall& call, const TransitionGradient<S>& g, int threads) {
  const int64_t blocks = block_count(call.numel);
  ThreadPool::instance().run(call.batch * blocks, threads,
                             [&](int64_t unit) { gradient_block<S>(call, g, unit / blocks, unit % blocks); });
}

}  // namespace dgf
