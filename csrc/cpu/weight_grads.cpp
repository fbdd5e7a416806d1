// SPDX-License-Identifier: MIT
// torch.ops.pc_kernels_native.weight_grads: dW_l = scale * delta_l^T v_{l-1} and db_l = scale * sum delta_l of all layers in two
// parallel regions: the transposes of the errors, then the products by panels of columns. A sum over the batch has a fixed
// order, whatever the number of threads.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "../describe.h"
#include "product.h"

namespace pc {
namespace {

constexpr int64_t kRows = 64;    // of dW in one micro-kernel call
constexpr int64_t kInner = 256;  // samples in one micro-kernel call: a panel of them stays in the second-level cache
constexpr int64_t kPitch = kInner + 16;  // an odd number of cache lines: rows of the transpose spread over the cache's sets

struct Gradient {  // of one layer
  int64_t batch, width, inputs;
  const float *delta, *v;  // (batch, width), (batch, inputs)
  float *errors;           // per block of kInner samples (width, kPitch): scale * delta^T
  float *weight, *bias;    // (width, inputs); (width,) or null
};

float* errors_of(const Gradient& g, int64_t b0) { return g.errors + b0 / kInner * g.width * kPitch; }

// Rows [first, last) of scale * delta^T, and their sums.
void transpose(const Gradient& g, float scale, int64_t first, int64_t last) {
  std::vector<double> sums(last - first);
  for (int64_t b0 = 0; b0 < g.batch; b0 += kInner) {
    const int64_t samples = std::min(kInner, g.batch - b0);
    float* block = errors_of(g, b0);
    for (int64_t b = 0; b < samples; ++b) {
      const float* row = g.delta + (b0 + b) * g.width;
      for (int64_t i = first; i < last; ++i) block[i * kPitch + b] = scale * row[i];
    }
    for (int64_t i = first; g.bias && i < last; ++i) {
      sums[i - first] += row_sum<float>(samples, [=](int64_t b) { return block[i * kPitch + b]; });
    }
  }
  if (g.bias) std::copy(sums.begin(), sums.end(), g.bias + first);
}

// Columns [first, first + columns) of dW; `panel` has room for the values' columns: kInner x kPanel.
void multiply(const Gradient& g, int64_t first, float* panel) {
  const int64_t columns = std::min(kPanel, g.inputs - first);
  for (int64_t b0 = 0; b0 < g.batch; b0 += kInner) {
    const int64_t samples = std::min(kInner, g.batch - b0);
    for (int64_t b = 0; b < samples; ++b) {
      std::copy_n(g.v + (b0 + b) * g.inputs + first, columns, panel + b * columns);
    }
    for (int64_t i = 0; i < g.width; i += kRows) {
      at::native::cpublas::brgemm(std::min(kRows, g.width - i), columns, samples, kPitch, columns, g.inputs, b0 > 0,
                                  errors_of(g, b0) + i * kPitch, panel, g.weight + i * g.inputs + first);
    }
  }
}

// run(layer, first) for every block of `size` out of `extent(layer)`
template <class Extent, class Run>
void for_each_block(const std::vector<Gradient>& all, int64_t size, const Extent& extent, const Run& run) {
  std::vector<std::pair<const Gradient*, int64_t>> work;
  for (const Gradient& g : all) {
    for (int64_t first = 0; first < extent(g); first += size) work.emplace_back(&g, first);
  }
  at::parallel_for(0, static_cast<int64_t>(work.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> room(kInner * kPanel);
    for (int64_t i = begin; i < end; ++i) run(*work[i].first, work[i].second, room.data());
  });
}

void weight_grads_float(const std::vector<Gradient>& all, float scale) {
  for_each_block(all, kRows, [](const Gradient& g) { return g.width; }, [=](const Gradient& g, int64_t first, float*) {
    transpose(g, scale, first, std::min(first + kRows, g.width));
  });
  for_each_block(all, kPanel, [](const Gradient& g) { return g.inputs; },
                 [](const Gradient& g, int64_t first, float* panel) { multiply(g, first, panel); });
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> weight_grads(Tensors deltas, Tensors values, const Flags& biased,
                                                                  double scale) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_count("values", values.size(), deltas.size());
  check_count("biased", biased.size(), deltas.size());
  TORCH_CHECK_VALUE(!deltas.empty(), "deltas: wanted at least one layer, got none");
  Call call;
  call.dtype = deltas[0].scalar_type();
  TORCH_CHECK_TYPE(call.dtype == at::kFloat || call.dtype == at::kDouble, "deltas: wanted float32 or float64, got ", call.dtype);
  std::vector<Tensor> weights, biases;
  std::vector<Gradient> all;
  for (size_t l = 0; l < deltas.size(); ++l) {
    check_like("deltas", deltas[l], call);
    check_like("values", values[l], call);
    TORCH_CHECK_VALUE(deltas[l].dim() == 2 && values[l].dim() == 2 && values[l].size(0) == deltas[l].size(0),
                      "values: wanted one row per row of deltas ", deltas[l].sizes(), ", got ", values[l].sizes());
    const Tensor delta = call.keep(deltas[l]), v = call.keep(values[l]);
    if (call.dtype == at::kDouble || delta.size(0) == 0) {  // nothing to pack: torch's own product
      weights.push_back(delta.t().mm(v).mul_(scale));
      biases.push_back(biased[l] ? delta.sum(0).mul_(scale) : delta.new_empty({0}));
      continue;
    }
    weights.push_back(at::empty({delta.size(1), v.size(1)}, delta.options()));
    biases.push_back(at::empty({biased[l] ? delta.size(1) : 0}, delta.options()));
    const int64_t blocks = (delta.size(0) + kInner - 1) / kInner;
    float* errors = call.keep(at::empty({blocks * delta.size(1) * kPitch}, delta.options())).data_ptr<float>();
    all.push_back({delta.size(0), delta.size(1), v.size(1), delta.data_ptr<float>(), v.data_ptr<float>(), errors,
                   weights.back().data_ptr<float>(), biased[l] ? biases.back().data_ptr<float>() : nullptr});
  }
  weight_grads_float(all, static_cast<float>(scale));
  return {weights, biases};
}

}  // namespace
}  // namespace pc

TORCH_LIBRARY_FRAGMENT(pc_kernels_native, m) {
  m.def("weight_grads(Tensor[] deltas, Tensor[] values, bool[] biased, float scale) -> (Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(pc_kernels_native, CPU, m) { m.impl("weight_grads", &pc::weight_grads); }
TORCH_LIBRARY_IMPL(pc_kernels_native, Autograd, m) { m.impl("weight_grads", torch::CppFunction::makeFallthrough()); }
