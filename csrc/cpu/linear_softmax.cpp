// SPDX-License-Identifier: MIT
// torch.ops.pc_kernels_native.linear_softmax_errors: a linear layer, a softmax and the energy of a clamped node over many
// classes, a tile of rows at a time, so that the logits never exist whole:
//
//     a = v W^T + b (tile),  energy and delta = dE/da in place,  grad_v = delta W (tile)
//
// In bf16 the operands of both products are rounded, delta among them; sums are float32. With weight gradients (fp32 alone)
// the tiles of a group also leave delta^T behind, and grad_weight += delta^T v follows by blocks of
// classes. Every sum has a fixed order, whatever the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../describe.h"
#include "chain_kernels.h"
#include "node_kernels.h"
#include "product.h"

namespace pc {
namespace {

constexpr int64_t kTileBytes = 1 << 20;  // of logits: what a core's second-level cache holds
constexpr int64_t kMostRows = 64;        // of a tile
constexpr int64_t kGroup = 256;          // rows whose delta^T exists at a time
constexpr int64_t kDepth = 256;          // classes that one micro-kernel call of delta W sums over
constexpr int64_t kClasses = 64;         // of grad_weight, in one micro-kernel call

template <class T>
struct Problem {
  int64_t rows, classes, inputs;
  const T* v;            // (rows, inputs)
  Weight<T> weight;      // (classes, inputs)
  const T* bias;         // (classes,) or null
  const int64_t* index;  // (rows,): the target as class indices, or null
  const T* target;       // (rows, classes): as probabilities, or null
  bool squared;          // 1/2 sum (q - o)^2 instead of the KL
  T *energy, *grad_v;    // (rows,), (rows, inputs)
  T *grad_weight, *grad_bias;  // (classes, inputs), (classes,); null: not wanted
  T* errors;             // of a group: float (classes, kGroup), double (kGroup, classes)
};

template <class T>
struct Room {  // of a thread
  std::vector<T> logits, scratch, one_hot;
  std::vector<at::BFloat16> rounded;  // with bf16: the rows of one factor, zeros up to an even number of columns
};

template <class T>
int64_t tile_rows(int64_t classes) {
  const int64_t fit = kTileBytes / static_cast<int64_t>(sizeof(T)) / classes;
  return std::clamp<int64_t>(fit / 8 * 8, 8, kMostRows);
}

// One row: its energy; the logits a become delta.
template <class T>
double row_errors(const Problem<T>& p, int64_t row, T* a, Room<T>& room) {
  const int64_t n = p.classes;
  T* out = room.scratch.data();
  View<T> view{1, n, n, nullptr, a, nullptr, nullptr, nullptr, nullptr, nullptr, out, out + n};
  if (p.index != nullptr) view.index = p.index + row;
  if (p.target != nullptr) view.phi = p.target + row * n;
  if (!p.squared) {
    const double energy = run_node<T>(Energy::categorical, view, Form::kTargetErrors);
    std::copy_n(out, n, a);
    return energy;
  }
  if (p.index != nullptr) {
    room.one_hot[p.index[row]] = 1;
    view.phi = room.one_hot.data();
    view.index = nullptr;
  }
  activate<T>(Activation::softmax, n, nullptr, a, out);
  view.mu = out, view.grad_mu = a, view.room = out + n;
  const double energy = run_node<T>(Energy::gaussian, view, Form::kTargetErrors);
  activation_vjp<T>(Activation::softmax, n, a, out, a);
  if (p.index != nullptr) room.one_hot[p.index[row]] = 0;
  return energy;
}

// x (m, n) as the left factor of a product with pairs
const at::BFloat16* round_rows(int64_t m, int64_t n, const float* x, std::vector<at::BFloat16>& out) {
  for (int64_t i = 0; i < m; ++i) {
    at::BFloat16* row = out.data() + i * paired(n);
    to_bfloat16(n, x + i * n, reinterpret_cast<uint16_t*>(row));
    if (n % 2) row[n] = 0.0f;
  }
  return out.data();
}

// grad_v (m, inputs) = delta W, in steps over the classes: a piece of delta serves all columns while it is near.
void pull(const Weight<float>& w, int64_t m, const float* delta, float* out, Room<float>& room) {
  const bool pairs = w.backward_pairs != nullptr;
  const int64_t depth = pairs ? paired(w.width) : w.width;
  const at::BFloat16* rounded = pairs ? round_rows(m, w.width, delta, room.rounded) : nullptr;
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t inner = std::min(kDepth, depth - k);
    for (int64_t first = 0; first < w.inputs; first += kPanel) {
      const int64_t columns = std::min(kPanel, w.inputs - first);
      if (pairs) {
        at::native::cpublas::brgemm(m, columns, inner, depth, columns, w.inputs, k > 0, rounded + k,
                                    w.backward_pairs + first * depth + k * columns, out + first, true);
      } else {
        at::native::cpublas::brgemm(m, columns, inner, depth, w.inputs, w.inputs, k > 0, delta + k,
                                    w.rows + k * w.inputs + first, out + first);
      }
    }
  }
}
void pull(const Weight<double>& w, int64_t m, const double* delta, double* out, Room<double>&) {
  backward(w, m, delta, w.width, out, w.inputs);
}

// Leaves delta where `accumulate` reads it: transposed, since a micro-kernel's left factor is row-major.
void leave(const Problem<float>& p, int64_t m, int64_t at_row, const float* delta) {
  constexpr int64_t kLine = 16;
  for (int64_t c0 = 0; c0 < p.classes; c0 += kLine) {
    const int64_t c1 = std::min(p.classes, c0 + kLine);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t c = c0; c < c1; ++c) p.errors[c * kGroup + at_row + i] = delta[i * p.classes + c];
    }
  }
}
void leave(const Problem<double>& p, int64_t m, int64_t at_row, const double* delta) {
  std::copy_n(delta, m * p.classes, p.errors + at_row * p.classes);
}

// grad_weight and grad_bias += delta^T v, delta^T of the rows [first, first + count)
void accumulate(const Problem<float>& p, int64_t first, int64_t count) {
  at::parallel_for(0, (p.classes + kClasses - 1) / kClasses, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kClasses; c < std::min(end * kClasses, p.classes); c += kClasses) {
      const int64_t classes = std::min(kClasses, p.classes - c);
      for (int64_t j = 0; j < p.inputs; j += kPanel) {
        at::native::cpublas::brgemm(classes, std::min(kPanel, p.inputs - j), count, kGroup, p.inputs, p.inputs, first > 0,
                                    p.errors + c * kGroup, p.v + first * p.inputs + j, p.grad_weight + c * p.inputs + j);
      }
      for (int64_t i = c; p.grad_bias && i < c + classes; ++i) {
        const float* row = p.errors + i * kGroup;
        const float sum = static_cast<float>(row_sum<float>(count, [=](int64_t b) { return row[b]; }));
        p.grad_bias[i] = first > 0 ? p.grad_bias[i] + sum : sum;
      }
    }
  });
}
void accumulate(const Problem<double>& p, int64_t first, int64_t count) {
  const Tensor delta = view_of(p.errors, count, p.classes, p.classes);
  Tensor weight = view_of(p.grad_weight, p.classes, p.inputs, p.inputs);
  at::addmm_out(weight, weight, delta.t(), view_of(p.v + first * p.inputs, count, p.inputs, p.inputs), first > 0 ? 1 : 0);
  for (int64_t c = 0; p.grad_bias && c < p.classes; ++c) {
    const double* column = p.errors + c;
    const double sum = row_sum<double>(count, [&](int64_t b) { return column[b * p.classes]; });
    p.grad_bias[c] = first > 0 ? p.grad_bias[c] + sum : sum;
  }
}

void predict(const Problem<float>& p, int64_t m, const float* v, Room<float>& room) {
  if (p.weight.forward_pairs == nullptr) return forward(p.weight, m, v, p.inputs, room.logits.data(), p.classes);
  const at::BFloat16* left = round_rows(m, p.inputs, v, room.rounded);
  multiply_pairs(m, p.inputs, p.classes, left, paired(p.inputs), p.weight.forward_pairs, false, room.logits.data(), p.classes);
}
void predict(const Problem<double>& p, int64_t m, const double* v, Room<double>& room) {
  forward(p.weight, m, v, p.inputs, room.logits.data(), p.classes);
}

template <class T>
void run_tile(const Problem<T>& p, int64_t row, int64_t m, int64_t group, Room<T>& room) {
  T* logits = room.logits.data();
  predict(p, m, p.v + row * p.inputs, room);
  for (int64_t i = 0; i < m; ++i) {
    T* a = logits + i * p.classes;
    if (p.bias != nullptr) activate<T>(Activation::identity, p.classes, p.bias, a, a);
    p.energy[row + i] = static_cast<T>(row_errors(p, row + i, a, room));
  }
  pull(p.weight, m, logits, p.grad_v + row * p.inputs, room);
  if (p.grad_weight != nullptr) leave(p, m, row - group, logits);
}

template <class T>
void run(const Problem<T>& p) {
  const int64_t group = p.grad_weight != nullptr ? kGroup : p.rows;
  for (int64_t first = 0; first < p.rows; first += group) {
    const int64_t count = std::min(group, p.rows - first), threads = std::max(at::get_num_threads(), 1);
    const int64_t share = (count + threads - 1) / threads;  // a tile for every thread, where there are few rows
    const int64_t tile = std::min(tile_rows<T>(p.classes), std::max<int64_t>(share, 1));
    at::parallel_for(0, (count + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
      Room<T> room{std::vector<T>(tile * p.classes), std::vector<T>(p.classes + row_room(p.classes)), std::vector<T>(p.classes), {}};
      if (p.weight.forward_pairs) room.rounded.resize(tile * paired(std::max(p.classes, p.inputs)));
      for (int64_t t = begin; t < end; ++t) run_tile(p, first + t * tile, std::min(tile, count - t * tile), first, room);
    });
    if (p.grad_weight != nullptr) accumulate(p, first, count);
  }
}

// W^T and W as pairs
void round_weight(Weight<float>& w, Call& call) {
  auto room = [&](int64_t inner, int64_t outer) {
    return call.keep(at::empty({paired(inner) * outer}, at::kBFloat16)).data_ptr<at::BFloat16>();
  };
  at::BFloat16 *forward = room(w.inputs, w.width), *backward = room(w.width, w.inputs);
  at::parallel_for(0, panel_count(w.width), 8, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_pair_panel(w.rows, w.inputs, w.width, 1, w.inputs, p, forward);
  });
  at::parallel_for(0, panel_count(w.inputs), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) pack_pair_panel(w.rows, w.width, w.inputs, w.inputs, 1, p, backward);
  });
  w.forward_pairs = forward, w.backward_pairs = backward;
}

template <class T>
Weight<T> weight_of(const Tensor& weight, bool pairs, Call& call) {
  Weight<T> out{weight.size(0), weight.size(1), weight.data_ptr<T>(), nullptr, nullptr, nullptr};
  if constexpr (std::is_same_v<T, float>) {
    if (pairs) {
      round_weight(out, call);
      return out;
    }
    float* panels = call.keep(at::empty_like(weight)).template data_ptr<float>();
    at::parallel_for(0, panel_count(out.width), 8, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) pack_panel(out.rows, out.width, out.inputs, p, panels);
    });
    out.panels = panels;
  }
  return out;
}

struct Arguments {
  Tensor v, weight;
  std::optional<Tensor> bias;
  Tensor target;
  bool weight_grads, squared, bf16;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Results errors_of(const Arguments& given) {
  Call call;
  call.dtype = given.v.scalar_type();
  const Tensor v = call.keep(given.v), weight = call.keep(given.weight);
  const int64_t rows = v.size(0), classes = weight.size(0), inputs = v.size(1);
  const bool biased = given.bias.has_value(), soft = given.target.is_floating_point();
  auto make = [&](at::IntArrayRef shape) { return rows > 0 ? at::empty(shape, v.options()) : at::zeros(shape, v.options()); };
  const Tensor energy = make({rows}), grad_v = make({rows, inputs});
  const Tensor grad_weight = given.weight_grads ? make({classes, inputs}) : at::empty({0}, v.options());
  const Tensor grad_bias = make({given.weight_grads && biased ? classes : 0});
  if (rows == 0) return {energy, grad_v, grad_weight, grad_bias};
  Problem<T> p{};
  p.rows = rows, p.classes = classes, p.inputs = inputs;
  p.v = v.data_ptr<T>(), p.weight = weight_of<T>(weight, given.bf16, call);
  p.bias = biased ? call.keep(*given.bias).template data_ptr<T>() : nullptr;
  p.index = soft ? nullptr : checked_indices(call, given.target, classes);
  p.target = soft ? call.keep(given.target).template data_ptr<T>() : nullptr;
  p.squared = given.squared;
  p.energy = energy.data_ptr<T>(), p.grad_v = grad_v.data_ptr<T>();
  if (given.weight_grads) {
    p.grad_weight = grad_weight.data_ptr<T>();
    p.grad_bias = biased ? grad_bias.data_ptr<T>() : nullptr;
    p.errors = call.keep(at::empty({classes * kGroup}, v.options())).template data_ptr<T>();
  }
  run(p);
  return {energy, grad_v, grad_weight, grad_bias};
}

// Rows that the mask leaves out get zeros; the others are computed alone.
Results linear_softmax_errors(const Tensor& v, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
                              const std::optional<Tensor>& mask, bool weight_grads, const std::string& precision,
                              const std::string& energy) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK_VALUE(energy == "categorical" || energy == "gaussian", "energy: wanted categorical or gaussian, got ", energy);
  TORCH_CHECK_VALUE(v.dim() == 2 && weight.dim() == 2 && weight.size(1) == v.size(1) && target.size(0) == v.size(0),
                    "v: wanted rows (R, V) beside weight (D, V) and R targets, got ", v.sizes(), ", ", weight.sizes(), ", ",
                    target.sizes());
  TORCH_CHECK_VALUE(precision == "fp32" || precision == "bf16", "precision: wanted fp32 or bf16, got ", precision);
  TORCH_CHECK_VALUE(precision == "fp32" || (v.scalar_type() == at::kFloat && !weight_grads),
                    "precision: wanted fp32 with float64 or with weight gradients, got ", precision);
  Arguments given{v, weight, bias, target, weight_grads, energy == "gaussian", precision == "bf16"};
  Tensor shown;
  if (mask.has_value()) {
    shown = mask->nonzero().squeeze(1);
    given.v = v.index_select(0, shown);
    given.target = target.index_select(0, shown);
  }
  Results found = v.scalar_type() == at::kDouble ? errors_of<double>(given) : errors_of<float>(given);
  if (!mask.has_value()) return found;
  const Tensor all_energy = at::zeros({v.size(0)}, v.options()), all_grad = at::zeros(v.sizes(), v.options());
  all_energy.index_copy_(0, shown, std::get<0>(found));
  all_grad.index_copy_(0, shown, std::get<1>(found));
  return {all_energy, all_grad, std::get<2>(found), std::get<3>(found)};
}

}  // namespace
}  // namespace pc

TORCH_LIBRARY_FRAGMENT(pc_kernels_native, m) {
  m.def(
      "linear_softmax_errors(Tensor v, Tensor weight, Tensor? bias, Tensor target, Tensor? mask, bool weight_grads, "
      "str precision, str energy) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pc_kernels_native, CPU, m) { m.impl("linear_softmax_errors", &pc::linear_softmax_errors); }
TORCH_LIBRARY_IMPL(pc_kernels_native, Autograd, m) {
  m.impl("linear_softmax_errors", torch::CppFunction::makeFallthrough());
}
