#pragma once

#include "grid.h"

namespace dgf {

// A row outside the table: NaN in that sample, nothing read beside the table, the other samples untouched.
inline void row_outside_the_table() {
  context = "row outside the table";
  const int64_t numel = 3000;
  Tensor x, v, next;
  make(x, 3, numel, DType::f32, kPacked, [] { return 0.5; });
  make(v, 3, numel, DType::f32, kPacked, [] { return 0.25; });
  make(next, 3, numel, DType::f32, kPacked, nullptr);
  const std::vector<float> rows = table<float>(false);
  for (const int64_t wrong : {int64_t{-1}, kRows, int64_t{1} << 40}) {
    const std::vector<int64_t> steps = {0, wrong, 3};
    TransitionCall call;
    call.batch = 3;
    call.numel = numel;
    call.latents = x.operand;
    call.output = v.operand;
    call.next = next.operand;
    call.table = rows.data();
    call.table_rows = kRows;
    call.step = steps.data();
    NoiseSource noise;
    noise.seeded = true;
    Room room(3, numel);
    std::vector<float> log_prob(3);
    run_grid<ScoreBlock<float>>(3 * tile_count(numel), 0, [&](int64_t unit, ScoreBlock<float>& s) {
      transition_sample_block(call, noise, Operand(), unit, true, room.workspace, log_prob.data(), s);
    });
    const float* out = reinterpret_cast<const float*>(next.bytes.data());
    expect(std::isnan(log_prob[1]) && std::isnan(out[numel]) && std::isnan(out[2 * numel - 1]), "NaN in the sample");
    expect(std::isfinite(log_prob[0]) && std::isfinite(log_prob[2]), "the other samples");
    expect(std::isfinite(out[numel - 1]) && std::isfinite(out[2 * numel]), "the other samples' latents");

    const std::vector<int64_t> noiseless = {0, 2, 3};
    call.step = noiseless.data();
    noise.seeded = false;
    run_grid<ScoreBlock<float>>(3 * tile_count(numel), 0, [&](int64_t unit, ScoreBlock<float>& s) {
      transition_sample_block(call, noise, Operand(), unit, true, room.workspace, log_prob.data(), s);
    });
    expect(std::isnan(log_prob[0]) && std::isnan(log_prob[2]), "NaN where noise is missing");
    expect(log_prob[1] == 0.0f && std::isfinite(out[numel]), "a row without noise needs none");
  }
}

// Terms of weight 0 hold anything and reach nothing; rows without noise, or outside the table, never pass for right.
inline void what_does_not_count() {
  context = "what does not count";
  const int64_t numel = 3000, batch = 4;
  Tensor x, v, next, reference;
  int64_t drawn = 0;
  make(x, batch, numel, DType::f32, kPacked, [&]() -> double {
    const int64_t sample = drawn++ / numel;
    return sample == 2 ? 1e30 : sample == 3 ? std::nan("") : 0.5;
  });
  make(v, batch, numel, DType::f32, kPacked, [] { return 0.25; });
  make(next, batch, numel, DType::f32, kPacked, [] { return 0.4; });
  make(reference, batch, numel, DType::f32, kPacked, [] { return std::nan(""); });
  const std::vector<float> rows = table<float>(false);
  std::vector<int64_t> steps = {1, 1, kNoiseless, 3};
  // An overflown ratio beside an advantage of 0, a ratio of 1, and two samples that are left out.
  std::vector<float> old = {-1e9f, 0.0f, 0.0f, 0.0f}, advantages = {0.0f, 1.0f, 1.0f, 1.0f};
  std::vector<float> weight = {1.0f, 1.0f, 0.0f, 0.0f};
  std::vector<float> log_prob(4), ratio(4), step_scale(4), pull_scale(4);
  float loss = 0.0f, metrics[kMetrics];
  bool has_grad[4];
  PolicyLossCall<float> p;
  p.transition.batch = batch;
  p.transition.numel = numel;
  p.transition.latents = x.operand;
  p.transition.output = v.operand;
  p.transition.next = next.operand;
  p.transition.table = rows.data();
  p.transition.table_rows = kRows;
  p.transition.step = steps.data();
  p.reference = reference.operand;  // with a KL of weight 0: a metric only
  p.old_log_prob = old.data();
  p.advantages = advantages.data();
  p.weight = weight.data();
  p.clip_low = p.clip_high = 10.0;
  p.advantage_clip = 5.0;
  const PolicyLossOutputs<float> out = {&loss,    log_prob.data(),   ratio.data(),     metrics,
                                        has_grad, step_scale.data(), pull_scale.data()};
  const auto launch = [&] {
    Room room(batch, numel);
    run_grid<LossBlock<float>>(batch * tile_count(numel), 0, [&](int64_t unit, LossBlock<float>& s) {
      policy_loss_block(p, unit, true, room.workspace, out, s);
    });
  };
  launch();
  old[1] = log_prob[1];
  launch();
  expect(loss == -0.25f && metrics[kPolicyLoss] == -0.5f, "a loss of the one sample that counts");
  expect(std::isinf(ratio[0]) && !has_grad[0] && step_scale[0] == 0.0f, "an advantage of 0 beside a ratio of infinity");
  expect(ratio[1] == 1.0f && has_grad[1] && std::isfinite(step_scale[1]), "the sample that counts");
  for (size_t b : {2, 3}) expect(!has_grad[b] && step_scale[b] == 0.0f, "samples that are left out");
  for (float scale : pull_scale) expect(scale == 0.0f, "a KL of weight 0");
  expect(std::isnan(metrics[kReferenceKl]) && metrics[kSamples] == 2.0f, "the metric of the KL");

  for (const int64_t row : {kNoiseless, kRows})
    for (const float advantage : {0.0f, 1.0f}) {
      steps[2] = row;
      advantages[2] = advantage;
      weight[2] = 1.0f;
      launch();
      expect(std::isnan(loss) && std::isnan(ratio[2]) && std::isnan(step_scale[2]) && has_grad[2], "no such ratio");
      expect(ratio[1] == 1.0f && std::isfinite(step_scale[1]), "the other samples");
    }
  weight[2] = 0.0f;
  // NaN comes first, last and between.
  advantages = {1.0f, 1.0f, 1.0f, 1.0f};
  weight = {1.0f, 1.0f, 0.0f, 1.0f};
  make(x, batch, numel, DType::f32, kPacked, [] { return 0.5; });
  p.transition.latents = x.operand;
  for (const size_t wrong : {0, 1, 3}) {
    old = log_prob;
    launch();
    old = log_prob;
    old[0] += 0.25f;
    old[wrong] = std::nanf("");
    launch();
    expect(std::isnan(metrics[kRatioMaxDev]), "the largest deviation keeps NaN");
  }
}

// Offsets of a batch that passes 2^31 elements, without its memory.
inline void offsets_are_wide() {
  context = "wide offsets";
  static char base;
  Operand t;
  t.data = &base;
  t.dtype = DType::bf16;
  t.batch_stride = int64_t{3} << 30;
  t.ndim = 2;
  t.size[0] = 3;
  t.size[1] = int64_t{1} << 30;
  t.stride[0] = 1;
  t.stride[1] = 3;
  const int64_t element = (int64_t{5} << 29) + 1;  // row 2, column 2^29 + 1
  expect(element_offset(t, element) == 2 + 3 * ((int64_t{1} << 29) + 1), "offset in a sample of 3 x 2^30");
  const intptr_t at = reinterpret_cast<intptr_t>(&base);
  expect(reinterpret_cast<intptr_t>(t.address(7, 0)) - at == 7 * (int64_t{3} << 31), "address of sample 7");
  expect(tile_count(int64_t{1} << 40) == (int64_t{1} << 40) / kTile, "tiles of 2^40 elements");
}

}  // namespace dgf
