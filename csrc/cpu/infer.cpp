// SPDX-License-Identifier: MIT
// The T-step engine on the CPU. Samples are independent given the weights, so a tile of samples goes through all layers and all
// steps inside one thread, with its state in that core's cache; threads share the packed weights and never wait for each other.
// A row's result does not depend on its tile: the products accumulate over the inputs in order, the kernels see one row.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "../infer.h"
#include "chain_kernels.h"
#include "node_kernels.h"
#include "weights.h"

namespace pc {
namespace {

constexpr int64_t kTile = 32;  // samples: three 512-wide nodes with their errors then fit a 1 MiB second-level cache
constexpr int64_t kAlign = 16;  // floats in a cache line

// Row pitch: whole lines, and an odd number of them, so that the rows of a column spread over the sets of the cache.
int64_t pitch_of(int64_t width) { return (((width + kAlign - 1) / kAlign) | 1) * kAlign; }

// A tile's size is a power of two (fewer sizes, fewer micro-kernels to generate), small enough to give every thread one.
int64_t tile_size(int64_t batch) {
  const int64_t share = (batch + at::get_num_threads() - 1) / at::get_num_threads();
  int64_t size = 1;
  while (size < kTile && size < share) size *= 2;
  return size;
}

// ---------------------------------------------------------------------------------------------------------------------
// a tile

template <class T>
struct Node {  // of all samples of the tile; a row is a sample
  int64_t pitch;
  T *a, *mu, *phi, *v, *delta, *g, *u, *last;  // u: velocity, last: v at the last product; null where not needed
};

template <class T>
class Tile {
 public:
  Tile(const InferDesc& run, const Weights<T>& weights) : run_(run), weights_(weights.layers), nodes_(run.count) {
    allocate();
  }

  InferOutcome solve(int64_t first, int64_t samples, int64_t rows) {
    first_ = first, samples_ = samples, rows_ = rows;
    outcome_ = InferOutcome{};
    std::fill(frozen_.begin(), frozen_.end(), 0);
    start();
    record(0);
    for (int64_t t = 1; t <= run_.steps; ++t) {
      if (!advance(run_.moves[std::min(t, run_.move_count) - 1])) break;
      outcome_.steps = t;
      record(t);
    }
    finish();
    return outcome_;
  }

 private:
  const LayerDesc& layer(int64_t l) const { return run_.layers[l]; }
  T* row(T* base, int64_t l, int64_t i) const { return base + i * nodes_[l].pitch; }

  T* zeros(int64_t size) {
    storage_.push_back(at::zeros({size}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value)));
    return storage_.back().template data_ptr<T>();
  }

  void allocate() {
    for (int64_t l = 0; l < run_.count; ++l) {
      const LayerDesc& d = layer(l);
      Node<T>& node = nodes_[l];
      node.pitch = pitch_of(d.width);
      widest_ = std::max(widest_, node.pitch);
      const bool own_mu = d.activation != Activation::identity, own_u = run_.momentum != 0, own_last = run_.bf16_delta;
      const bool own_v = d.feed != static_cast<int>(Activation::identity) && !d.passes_target;
      const int64_t size = kTile * node.pitch;
      T* next = zeros((4 + own_mu + own_v + own_u + own_last) * size);  // one allocation: small nets are made of these
      const auto take = [&] { return std::exchange(next, next + size); };
      for (T** field : {&node.a, &node.phi, &node.delta, &node.g}) *field = take();
      node.mu = own_mu ? take() : node.a;
      node.v = own_v ? take() : node.phi;
      node.u = own_u ? take() : nullptr;
      node.last = own_last ? take() : nullptr;
    }
    x_ = zeros(kTile * layer(0).inputs);
    back_ = zeros(kTile * widest_);
    room_ = zeros(std::max(3 * widest_, kTile * (layer(0).inputs + kPanel)));
    flags_.resize(widest_);
    frozen_.resize(kTile);
    half_ = at::empty({run_.bf16_delta ? kTile * widest_ : 0}, at::TensorOptions().dtype(at::kBFloat16));
  }

  // Forward initialisation of the nodes whose state is not given, and the errors at it.
  void start() {
    const int64_t inputs = layer(0).inputs;
    std::memcpy(x_, static_cast<const T*>(run_.x) + first_ * inputs, sizeof(T) * samples_ * inputs);
    std::memset(x_ + samples_ * inputs, 0, sizeof(T) * (rows_ - samples_) * inputs);
    for (int64_t l = 0; l < run_.count; ++l) {
      Node<T>& node = nodes_[l];
      if (l == 0) {
        forward_once(weights_[0], rows_, x_, inputs, node.a, node.pitch, room_);
      } else {
        forward(weights_[l], rows_, nodes_[l - 1].v, nodes_[l - 1].pitch, node.a, node.pitch);
        keep_last(nodes_[l - 1]);
      }
      ++outcome_.products;
      predict(l, true);
      set_state(l);
      feed(l);
      if (node.u) std::memset(node.u, 0, sizeof(T) * rows_ * node.pitch);
    }
    for (int64_t l = 1; l < run_.count; ++l) error(l);
  }

  void keep_last(const Node<T>& node) {
    if (node.last) std::memcpy(node.last, node.v, sizeof(T) * rows_ * node.pitch);
  }

  // mu_l from a_l; `fresh`: a_l has not had its bias yet
  void predict(int64_t l, bool fresh) {
    const Node<T>& node = nodes_[l];
    const T* bias = fresh ? static_cast<const T*>(layer(l).bias) : nullptr;
    for (int64_t i = 0; i < samples_; ++i) {
      activate(layer(l).activation, layer(l).width, bias, row(node.a, l, i), row(node.mu, l, i));
    }
  }

  void set_state(int64_t l) {
    const LayerDesc& d = layer(l);
    const int64_t width = d.clamped && d.energy == Energy::gaussian_full ? d.width / 2 : d.width;
    for (int64_t i = 0; i < samples_; ++i) {
      T* phi = row(nodes_[l].phi, l, i);
      const T* from = d.given ? static_cast<const T*>(d.given) + (first_ + i) * width : row(nodes_[l].mu, l, i);
      if (d.index) continue;
      std::memcpy(phi, from, sizeof(T) * width);
      if (d.energy != Energy::categorical_probs || d.clamped) continue;
      for (int64_t k = 0; k < width; ++k) phi[k] = phi[k] < T(kProbabilityFloor) ? T(kProbabilityFloor) : phi[k];
    }
  }

  void feed(int64_t l) {
    const Node<T>& node = nodes_[l];
    if (l + 1 == run_.count || node.v == node.phi) return;
    for (int64_t i = 0; i < samples_; ++i) {
      feed_value(layer(l).feed, layer(l).width, row(node.phi, l, i), softmax_mask(l, i), noise(l, i), row(node.v, l, i));
    }
  }

  const uint8_t* mask(int64_t l, int64_t i) const { return at(layer(l).mask, (first_ + i) * layer(l).mask_sample); }
  // hidden classes are left out of the softmax that a categorical node feeds on, too
  const uint8_t* softmax_mask(int64_t l, int64_t i) const {
    return layer(l).energy == Energy::categorical ? mask(l, i) : nullptr;
  }
  const T* noise(int64_t l, int64_t i) const {
    return at(static_cast<const T*>(layer(l).noise), (first_ + i) * (layer(l).width / 2));
  }

  View<T> view(int64_t l, int64_t i) const {
    const LayerDesc& d = layer(l);
    View<T> v{};
    v.rows = 1;
    v.width = d.width;
    v.phi_width = d.clamped && d.energy == Energy::gaussian_full ? d.width / 2 : d.width;
    v.phi = row(nodes_[l].phi, l, i);
    v.mu = row(nodes_[l].mu, l, i);
    v.log_var = static_cast<const T*>(d.log_var);
    v.index = at(d.index, first_ + i);
    v.mask = mask(l, i);
    v.room = room_;
    v.prior = static_cast<T>(d.prior);
    return v;
  }

  // delta_l = act'(a)^T dE/dmu
  void error(int64_t l) {
    const LayerDesc& d = layer(l);
    const bool fused = d.energy == Energy::categorical_probs && d.activation == Activation::softmax;
    for (int64_t i = 0; i < samples_; ++i) {
      View<T> v = view(l, i);
      v.grad_mu = row(nodes_[l].delta, l, i);
      if (fused) {
        softmax_delta(d.width, v.phi, v.mu, v.mask, v.grad_mu);
        continue;
      }
      run_node(d.energy, v, d.clamped ? Form::kTargetGradMu : Form::kGradMu);
      activation_vjp(d.activation, d.width, row(nodes_[l].a, l, i), v.mu, v.grad_mu);
    }
  }

  // back_ <- W_l^T delta_l, the feedback to the node below
  void pull(int64_t l) {
    const Node<T>& node = nodes_[l];
    ++outcome_.products;
    if constexpr (std::is_same_v<T, float>) {
      if (run_.bf16_delta) {
        for (int64_t i = 0; i < rows_; ++i) to_bfloat16(layer(l).width, row(node.delta, l, i), half_bits(i));
        pad_half(layer(l).width);
        multiply_pairs(rows_, layer(l).width, layer(l).inputs, half(), widest_, weights_[l].backward_pairs, false, back_, widest_);
        return;
      }
    }
    backward(weights_[l], rows_, node.delta, node.pitch, back_, widest_);
  }

  // a_l after v_{l-1} has changed
  void push(int64_t l) {
    const Node<T>&node = nodes_[l], &below = nodes_[l - 1];
    ++outcome_.products;
    if constexpr (std::is_same_v<T, float>) {
      if (run_.bf16_delta) {
        const int64_t inputs = layer(l).inputs;
        for (int64_t i = 0; i < rows_; ++i) {
          difference_to_bfloat16(inputs, row(below.v, l - 1, i), row(below.last, l - 1, i), half_bits(i));
        }
        pad_half(inputs);
        multiply_pairs(rows_, inputs, layer(l).width, half(), widest_, weights_[l].forward_pairs, true, node.a, node.pitch);
        return;
      }
    }
    forward(weights_[l], rows_, below.v, below.pitch, node.a, node.pitch);
  }

  at::BFloat16* half() { return half_.template data_ptr<at::BFloat16>(); }
  uint16_t* half_bits(int64_t i) { return reinterpret_cast<uint16_t*>(half() + i * widest_); }
  void pad_half(int64_t n) {  // an odd row's missing partner
    for (int64_t i = 0; n % 2 && i < rows_; ++i) half_bits(i)[n] = 0;
  }

  // g_l: the Euclidean gradient, or the natural step's direction
  void direct(int64_t l, bool feedback) {
    const LayerDesc& d = layer(l);
    const Node<T>& node = nodes_[l];
    if (feedback) pull(l + 1);
    for (int64_t i = 0; i < samples_; ++i) {
      T* back = feedback ? back_ + i * widest_ : nullptr;
      if (back && !d.natural) feed_vjp(d.feed, d.width, row(node.phi, l, i), row(node.v, l, i), noise(l, i), back);
      direction(d.energy, d.natural, view(l, i), d.width, back, row(node.g, l, i));
    }
  }

  // One Jacobi move of all nodes; false once every sample is frozen or nothing can move.
  bool advance(const Move& move) {
    if (!move.any) {
      if (run_.tol < 0) outcome_.steps = run_.steps;
      return false;
    }
    for (int64_t l = 0; l < run_.count; ++l) {
      if (move.moves[l]) direct(l, move.feedback[l]);
    }
    if (run_.tol >= 0 && freeze(move)) return false;
    for (int64_t l = 0; l < run_.count; ++l) {
      if (move.moves[l]) step(l);
    }
    for (int64_t l = 1; l < run_.count; ++l) {
      if (move.moves[l - 1]) {
        push(l);
        predict(l, !run_.bf16_delta);
      }
      if (move.refresh[l]) error(l);
    }
    return true;
  }

  void step(int64_t l) {
    const LayerDesc& d = layer(l);
    const Node<T>& node = nodes_[l];
    const T floor = d.energy == Energy::categorical_probs ? T(kProbabilityFloor) : T(-INFINITY);
    for (int64_t i = 0; i < samples_; ++i) {
      if (frozen_[i]) continue;
      T *phi = row(node.phi, l, i), *u = node.u ? row(node.u, l, i) : nullptr;
      move_row(d.width, row(node.g, l, i), moves(l, i), T(d.lr), T(run_.momentum), floor, phi, u);
    }
    feed(l);
  }

  const uint8_t* moves(int64_t l, int64_t i) {
    const uint8_t* hold = at(layer(l).hold, (first_ + i) * layer(l).hold_sample);
    return moving(mask(l, i), hold, layer(l).width, flags_.data());
  }

  // Samples whose gradient is below tol stop; true once all have.
  bool freeze(const Move& move) {
    bool all = true;
    for (int64_t i = 0; i < samples_; ++i) {
      double total = 0;
      for (int64_t l = 0; l < run_.count; ++l) {
        if (!move.moves[l]) continue;
        const LayerDesc& d = layer(l);
        total += squared_norm(d.energy, d.natural, d.width, row(nodes_[l].phi, l, i), mask(l, i), moves(l, i),
                              row(nodes_[l].g, l, i), room_);
      }
      if (std::sqrt(total) < run_.tol) frozen_[i] = 1;
      all = all && frozen_[i];
    }
    return all;
  }

  void record(int64_t t) {
    if (run_.energies == nullptr) return;
    for (int64_t l = 0; l < run_.count; ++l) {
      double* out = run_.energies + (t * run_.count + l) * run_.batch + first_;
      for (int64_t i = 0; i < samples_; ++i) {
        out[i] = run_node(layer(l).energy, view(l, i), layer(l).clamped ? Form::kTargetEnergy : Form::kEnergy);
      }
    }
    last_recorded_ = t;
    look(t);
  }

  void look(int64_t t) {
    for (int64_t l = 0; l < run_.count && outcome_.layer == 0; ++l) {
      if (layer(l).clamped) continue;
      for (int64_t i = 0; i < samples_; ++i) {
        const T* phi = row(nodes_[l].phi, l, i);
        if (std::all_of(phi, phi + layer(l).width, [](T value) { return std::isfinite(value); })) continue;
        outcome_.layer = l + 1, outcome_.step = t;
        break;
      }
    }
  }

  void finish() {
    error(0);
    if (run_.energies == nullptr) look(-1);
    repeat_energies();
    for (int64_t l = 0; l < run_.count; ++l) {
      const LayerDesc& d = layer(l);
      const size_t bytes = sizeof(T) * d.width;
      for (int64_t i = 0; i < samples_; ++i) {
        const int64_t to = (first_ + i) * d.width;
        std::memcpy(static_cast<T*>(d.delta) + to, row(nodes_[l].delta, l, i), bytes);
        if (d.phi) std::memcpy(static_cast<T*>(d.phi) + to, row(nodes_[l].phi, l, i), bytes);
      }
    }
  }

  // Rows of the trace after an early stop repeat the last.
  void repeat_energies() {
    if (run_.energies == nullptr) return;
    const int64_t plane = run_.count * run_.batch;
    for (int64_t last = last_recorded_, t = last + 1; t <= run_.steps; ++t) {
      for (int64_t l = 0; l < run_.count; ++l) {
        const double* from = run_.energies + last * plane + l * run_.batch + first_;
        std::copy(from, from + samples_, run_.energies + t * plane + l * run_.batch + first_);
      }
    }
  }

  const InferDesc& run_;
  const std::vector<Weight<T>>& weights_;
  std::vector<Node<T>> nodes_;
  std::vector<at::Tensor> storage_;
  at::Tensor half_;
  std::vector<uint8_t> flags_, frozen_;
  T *x_ = nullptr, *back_ = nullptr, *room_ = nullptr;
  int64_t widest_ = 0, first_ = 0, samples_ = 0, rows_ = 0, last_recorded_ = 0;  // of the tile at hand, but for the first
  InferOutcome outcome_;
};

// The earlier move, then the lower layer; without a trace (step -1) the lower layer.
void merge(InferOutcome& total, const InferOutcome& part) {
  total.steps = std::max(total.steps, part.steps);
  total.products = std::max(total.products, part.products);
  if (part.layer == 0) return;
  const bool sooner = total.layer == 0 || std::make_pair(part.step, part.layer) < std::make_pair(total.step, total.layer);
  if (sooner) total.layer = part.layer, total.step = part.step;
}

}  // namespace

template <class T>
InferOutcome infer_cpu(const InferDesc& run) {
  const Weights<T> weights = pack<T>(run);
  const int64_t size = tile_size(run.batch), tiles = (run.batch + size - 1) / size;
  std::vector<InferOutcome> outcomes(tiles);
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    Tile<T> tile(run, weights);
    for (int64_t i = begin; i < end; ++i) {
      outcomes[i] = tile.solve(i * size, std::min(size, run.batch - i * size), size);
    }
  });
  InferOutcome total;
  for (const InferOutcome& outcome : outcomes) merge(total, outcome);
  return total;
}

template InferOutcome infer_cpu<float>(const InferDesc&);
template InferOutcome infer_cpu<double>(const InferDesc&);

}  // namespace pc
