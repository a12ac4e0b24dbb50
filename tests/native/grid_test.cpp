// Runs the GPU kernels' own blocks on the CPU, lanes and blocks as loops, against the CPU kernels: the same buffers,
// byte for byte. Every tensor is its own heap block of exactly its size, so a sanitizer sees any access beside it.
#include "grid.h"

#include "grid_edges.h"

using namespace dgf;

namespace {

// Those run: thousands without guidance, ones with it.
int usual_steps = 0;

struct Setting {
  int64_t batch, numel;
  DType latents, output, next;
  Layout layout;
  bool guidance, rounding, seeded, per_sample;
  bool exact;  // sums that float holds exactly, so that their order cannot matter
};

// How far two sums of squares may lie apart: each rounds once for every term that it adds in the compute type.
template <typename S>
bool close(const std::vector<S>& a, const std::vector<S>& b) {
  const double terms = kWidth * kWindows + kChunk / kLanes + 2;
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
    const double scale = 1.0 + std::fabs(x) + 4.0;  // mean(d^2) / (2 tau^2) is below |log_prob| + 4 for these rows
    if (!(std::fabs(x - y) <= terms * static_cast<double>(std::numeric_limits<S>::epsilon()) * scale)) return false;
  }
  return true;
}

template <typename S>
void run(const Setting& c, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  const auto draw = [&]() -> double {
    return c.exact ? static_cast<double>(static_cast<int>(generator() % 9) - 4) * 0.25 : normal(generator);
  };
  Tensor x, v, u, given, next, clean, old_output, reference, grad, grad_uncond;
  make(x, c.batch, c.numel, c.latents, c.layout, draw);
  make(v, c.batch, c.numel, c.output, c.layout, draw);
  make(u, c.batch, c.numel, c.output, c.layout, draw);
  make(given, c.batch, c.numel, DType::f32, c.layout, draw);
  make(reference, c.batch, c.numel, c.output, c.layout, draw);
  make(old_output, c.batch, c.numel, c.output, c.layout, draw);
  make(next, c.batch, c.numel, c.next, c.layout, nullptr);
  make(clean, c.batch, c.numel, c.next, c.layout, nullptr);
  make(grad, c.batch, c.numel, c.output, c.layout, nullptr);
  make(grad_uncond, c.batch, c.numel, c.output, c.layout, nullptr);

  const std::vector<S> rows = table<S>(c.exact);
  std::vector<int64_t> steps, ids;
  for (int64_t b = 0; b < c.batch; ++b) {
    steps.push_back((b * 3 + 1) % kRows);
    ids.push_back((b << 33) + 5 * b);
  }
  TransitionCall call;
  call.batch = c.batch;
  call.numel = c.numel;
  call.latents = x.operand;
  call.output = v.operand;
  if (c.guidance) call.uncond = u.operand;
  call.next = next.operand;
  call.table = rows.data();
  call.table_rows = kRows;
  call.step = c.per_sample ? steps.data() : nullptr;
  call.step_index = 1;
  call.guidance_scale = c.exact ? 2.0 : 3.5;
  call.reference_rounding = c.rounding;
  NoiseSource noise;
  noise.seeded = c.seeded;
  noise.seed = 0x123456789ABCDEFull;
  noise.sample_ids = ids.data();
  if (!c.seeded) noise.given = given.operand;

  const size_t batch = static_cast<size_t>(c.batch);
  const int64_t units = c.batch * tile_count(c.numel);
  std::vector<S> log_prob(batch), grid_log_prob(batch);
  transition_sample(call, noise, clean.operand, 1, log_prob.data());
  for (int order = 0; order < 2; ++order) {
    Room room(c.batch, c.numel);
    std::vector<char> next_bytes(next.bytes.size(), char(0x5A)), clean_bytes(clean.bytes.size(), char(0x5A));
    TransitionCall grid = call;
    grid.next = next.on(next_bytes);
    const Operand grid_clean = clean.on(clean_bytes);
    const bool packets = std::is_same<S, float>::value && moves_in_packets(grid, noise, grid_clean);
    const bool aligned = c.layout == kPacked && c.numel % kWidth == 0 && std::is_same<S, float>::value;
    expect(!aligned || packets, "an aligned launch moves in packets");
    run_grid<ScoreBlock<S>>(units, order, [&](int64_t unit, ScoreBlock<S>& s) {
      transition_sample_block(grid, noise, grid_clean, unit, packets, room.workspace, grid_log_prob.data(), s);
    });
    expect(same(next_bytes, next.bytes), "next latents");
    expect(same(clean_bytes, clean.bytes), "denoised");
    expect(c.exact && !c.seeded ? same(grid_log_prob, log_prob) : close(grid_log_prob, log_prob), "sampled log_prob");
    expect(room.tickets_are_back(), "tickets after sampling");
    if constexpr (std::is_same<S, float>::value) {
      if (!may_be_usual(grid, noise, Operand(), packets)) continue;
      std::vector<float> usual_log_prob(batch);
      std::fill(next_bytes.begin(), next_bytes.end(), char(0x5A));
      const bool is_usual = if_usual(grid, [&](auto usual) {
        run_grid<ScoreBlock<float>>(units, order, [&](int64_t unit, ScoreBlock<float>& s) {
          usual.sample_block(grid, noise, unit, room.workspace, usual_log_prob.data(), s);
        });
      });
      if (!is_usual) continue;
      usual_steps += c.guidance ? 1 : 1000;
      expect(same(next_bytes, next.bytes), "next latents of a usual step");
      expect(same(usual_log_prob, grid_log_prob), "log_prob of a usual step");
    }
  }

  const std::vector<S> sampled = grid_log_prob;
  transition_log_prob(call, 1, log_prob.data());
  for (int order = 0; order < 2; ++order) {
    Room room(c.batch, c.numel);
    const bool packets = std::is_same<S, float>::value && step_moves_in_packets(call);
    run_grid<ScoreBlock<S>>(units, order, [&](int64_t unit, ScoreBlock<S>& s) {
      transition_log_prob_block(call, unit, packets, room.workspace, grid_log_prob.data(), s);
    });
    expect(same(grid_log_prob, sampled), "score of what was sampled, bit for bit");
    expect(room.tickets_are_back(), "tickets after scoring");
  }

  std::vector<S> old(batch), advantages(batch), weight(batch), step_scale(batch), pull_scale(batch), ratio(batch);
  for (size_t b = 0; b < batch; ++b) {
    old[b] = static_cast<S>(grid_log_prob[b] + static_cast<S>(b % 4 == 0 ? 0.0 : 0.01 * normal(generator)));
    advantages[b] = static_cast<S>(b == 2 ? 0.0 : 4.0 * normal(generator));
    const bool left_out = b % 5 == 4 || call.row_index(static_cast<int64_t>(b)) == kNoiseless;
    weight[b] = static_cast<S>(left_out ? 0.0 : 1.0 + 0.5 * static_cast<double>(b % 3));
  }
  for (int option = 0; option < 3; ++option) {
    PolicyLossCall<S> p;
    p.transition = call;
    if (option == 1) p.reference = reference.operand;
    if (option == 2) p.old_output = old_output.operand;
    p.ratio_norm = option == 2;
    p.old_log_prob = old.data();
    p.advantages = advantages.data();
    p.weight = weight.data();
    p.clip_low = 0.005;
    p.clip_high = 0.01;
    p.advantage_clip = 5.0;
    p.kl_weight = option == 1 ? 0.1 : 0.0;
    S loss[2], metrics[2][kMetrics];
    std::vector<S> scales[2][4] = {{log_prob, ratio, step_scale, pull_scale},
                                   {log_prob, ratio, step_scale, pull_scale}};
    std::vector<char> has_grad[2] = {std::vector<char>(batch), std::vector<char>(batch)};
    const auto outputs = [&](int k) {
      return PolicyLossOutputs<S>{&loss[k],
                                  scales[k][0].data(),
                                  scales[k][1].data(),
                                  metrics[k],
                                  reinterpret_cast<bool*>(has_grad[k].data()),
                                  scales[k][2].data(),
                                  scales[k][3].data()};
    };
    policy_loss(p, 1, outputs(0));
    for (int order = 0; order < 2; ++order) {
      Room room(c.batch, c.numel);
      const bool packets = std::is_same<S, float>::value && moves_in_packets(p);
      run_grid<LossBlock<S>>(units, order, [&](int64_t unit, LossBlock<S>& s) {
        policy_loss_block(p, unit, packets, room.workspace, outputs(1), s);
      });
      expect(same(scales[1][0], grid_log_prob), "the loss's log_prob is the scoring kernel's");
      expect(room.tickets_are_back(), "tickets after the loss");
      if (!c.exact || c.seeded) continue;
      for (int k = 0; k < 4; ++k) expect(same(scales[0][k], scales[1][k]), "per-sample outputs of the loss");
      expect(has_grad[0] == has_grad[1], "has_grad");
      expect(metrics[0][kSamples] == metrics[1][kSamples], "samples");
      expect(metrics[0][kRatioMaxDev] == metrics[1][kRatioMaxDev], "largest deviation");
      // Up to one sample a lane, the batch is summed in the CPU kernel's order too.
      if (c.batch > kTermLanes) continue;
      expect(std::memcmp(&loss[0], &loss[1], sizeof(S)) == 0, "loss");
      expect(std::memcmp(metrics[0], metrics[1], sizeof(metrics[0])) == 0, "metrics");
    }

    TransitionGradient<S> g;
    const S incoming = static_cast<S>(0.75);
    g.grad_output = grad.operand;
    if (c.guidance) g.grad_uncond = grad_uncond.operand;
    g.step_scale = scales[1][2].data();
    g.pull_scale = scales[1][3].data();
    g.grad_loss = &incoming;
    g.pull = p.reference;
    g.mean_output = p.old_output;
    for (int by_log_prob = 0; by_log_prob < 2; ++by_log_prob) {
      if (by_log_prob == 1) g.grad_log_prob = advantages.data();
      transition_gradient(call, g, 1);
      for (int order = 0; order < 2; ++order) {
        std::vector<char> grad_bytes(grad.bytes.size(), char(0x5A)), uncond_bytes(grad_uncond.bytes.size(), char(0x5A));
        TransitionGradient<S> grid = g;
        grid.grad_output = grad.on(grad_bytes);
        if (c.guidance) grid.grad_uncond = grad_uncond.on(uncond_bytes);
        const bool packets = std::is_same<S, float>::value && moves_in_packets(call, grid);
        struct Row {
          S value[kColumns];
        };
        run_grid<Row>(units, order,
                      [&](int64_t unit, Row& row) { transition_gradient_block(call, grid, unit, packets, row.value); });
        expect(same(grad_bytes, grad.bytes), "gradient");
        expect(same(uncond_bytes, grad_uncond.bytes), "gradient by the unconditional output");
      }
    }
  }
}

}  // namespace

// With an argument every setting around a tile, without one every two of size, layout and flags.
int main(int arguments, char**) {
  const DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  const DType mixes[][3] = {{f32, f32, f32}, {f32, bf16, f32}, {f32, bf16, bf16}, {bf16, f16, f32}, {f16, f32, f16}};
  const int64_t shapes[][2] = {{3, 1}, {2, 7}, {2, 8}, {3, 9}, {70, 5}, {2, 8191}, {2, 8192}, {3, 8193}};
  uint32_t seed = 1;
  const auto go = [&](const Setting& c, bool wide) {
    context = std::to_string(c.batch) + " x " + std::to_string(c.numel) + " dtypes " +
              std::to_string(static_cast<int>(c.latents)) + std::to_string(static_cast<int>(c.output)) +
              std::to_string(static_cast<int>(c.next)) + " " + kLayoutNames[c.layout] +
              (c.guidance ? " guidance" : "") + (c.rounding ? " rounding" : "") + (c.seeded ? " seeded" : "") +
              (c.per_sample ? " per sample" : "") + (c.exact ? " exact" : "") + (wide ? " double" : "");
    if (wide)
      run<double>(c, seed++);
    else
      run<float>(c, seed++);
  };
  int size = 0;
  for (const auto& shape : shapes) {
    ++size;
    for (int layout = 0; layout < kLayouts; ++layout)
      for (int m = 0; m < 5; ++m)
        for (int flags = 0; flags < 4; ++flags) {
          // Around a tile, which costs a thousand times more, each layout and flags have one of the dtypes.
          if (shape[1] > 1000 && (layout + flags) % 5 != m) continue;
          if (shape[1] > 1000 && arguments == 1 && (layout + size) % 4 != flags) continue;
          const auto& mix = mixes[m];
          go({shape[0], shape[1], mix[0], mix[1], mix[2], static_cast<Layout>(layout), (flags & 1) != 0,
              (flags & 2) != 0, seed % 3 != 0, seed % 2 == 0, seed % 4 < 2},
             false);
        }
  }
  for (int layout = 0; layout < kLayouts; ++layout)
    go({2, 4100, f64, bf16, f64, static_cast<Layout>(layout), true, layout % 2 == 0, true, true, false}, true);
  // More tiles than lanes, for the second stage of the sum.
  for (const bool exact : {false, true})
    if (exact || arguments > 1)
      go({arguments > 1 ? 2 : 1, kTile * kThreads + 4099, f32, bf16, f32, kPacked, false, false, !exact, true, exact},
         false);
  row_outside_the_table();
  what_does_not_count();
  offsets_are_wide();
  expect(usual_steps > 1000 && usual_steps % 1000 > 0, "usual steps with and without guidance");
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
