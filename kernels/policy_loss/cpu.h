#pragma once

#include "../transition/cpu.h"
#include "call.h"

namespace dgf {

template <typename S>
void policy_loss(const PolicyLossCall<S>& p, int threads, const PolicyLossOutputs<S>& out) {
  const TransitionCall& call = p.transition;
  const int64_t blocks = block_count(call.numel);
  const size_t units = static_cast<size_t>(call.batch * blocks);
  std::vector<double> squares(units), reference_squares(units), mean_squares(units);
  ThreadPool::instance().run(call.batch * blocks, threads, [&](int64_t unit) {
    const int64_t b = unit / blocks;
    const S* row = call.row<S>(b);
    Scratch<S> s;
    LaneSum<S> sum, reference_sum, mean_sum;
    for_each_chunk(unit % blocks, call.numel, [&](int64_t begin, int64_t n) {
      load_inputs(call, b, begin, n, s);
      const S* next = load(call.next, b, begin, n, s.next);
      difference_of(call, row, s.x, s.v, next, n, s.drift, s.denoised, S(1), s.extra);
      sum.add_squares(s.extra, n);
      if (p.reference.present()) {
        const S* reference = load(p.reference, b, begin, n, s.next);
        for (int64_t i = 0; i < n; ++i) s.extra[i] = s.v[i] - reference[i];
        reference_sum.add_squares(s.extra, n);
      }
      if (p.ratio_norm) {
        const S* old = load(p.old_output, b, begin, n, s.old_output);
        mean_of(call, row, s.x, s.v, n, s.drift, s.denoised, s.mean);
        mean_of(call, row, s.x, old, n, s.drift, s.denoised, s.next);
        for (int64_t i = 0; i < n; ++i) s.extra[i] = s.mean[i] - s.next[i];
        mean_sum.add_squares(s.extra, n);
      }
    });
    squares[static_cast<size_t>(unit)] = sum.total();
    reference_squares[static_cast<size_t>(unit)] = reference_sum.total();
    mean_squares[static_cast<size_t>(unit)] = mean_sum.total();
  });

  const double numel = static_cast<double>(call.numel);
  SampleTerms sum = {};
  for (int64_t b = 0; b < call.batch; ++b) {
    const size_t first = static_cast<size_t>(b * blocks);
    const MeanSquares mean_square = {ordered_sum(&squares[first], blocks) / numel,
                                     ordered_sum(&reference_squares[first], blocks) / numel,
                                     ordered_sum(&mean_squares[first], blocks) / numel};
    add_terms(sum, sample_terms(p, call.row<S>(b), b, mean_square, out));
  }
  write_loss(p, sum, out);
}

}  // namespace dgf
