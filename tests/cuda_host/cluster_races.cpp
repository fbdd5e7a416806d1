// SPDX-License-Identifier: MIT
// A program for ThreadSanitizer: the cluster kernel's CTAs, a thread each, on networks that take every kind of exchange. A barrier
// of the cluster that is missing is a race here; the numbers do not matter.
#include "cluster.cpp"

#include <cmath>
#include <cstdio>
#include <deque>

namespace {

struct Memory {
  std::deque<std::vector<float>> kept;
  float* floats(int64_t count) {
    kept.emplace_back(count);
    for (int64_t i = 0; i < count; ++i) kept.back()[i] = static_cast<float>(std::sin(0.7 * static_cast<double>(i)));
    return kept.back().data();
  }
};

struct Kind {
  pc::Activation activation;
  pc::Energy energy;
  pc::Activation feed;
};

bool run_network(const std::vector<int64_t>& widths, const std::vector<Kind>& kinds, double momentum, bool differences, bool general = false) {
  constexpr int64_t kBatch = 3, kSteps = 3, kInputs = 5;
  const int64_t count = static_cast<int64_t>(widths.size());
  Memory memory;
  std::vector<pc::ChainNode> nodes(count);
  for (int64_t l = 0; l < count; ++l) {
    pc::ChainNode& node = nodes[l];
    node.activation = kinds[l].activation, node.energy = kinds[l].energy, node.feed = static_cast<int>(kinds[l].feed);
    node.natural = node.energy == pc::Energy::categorical, node.clamped = l + 1 == count, node.lr = 0.01f;
    node.moves_from = node.clamped ? INT64_MAX : std::max<int64_t>(0, count - 2 - l);
    node.weight = memory.floats(widths[l] * (l > 0 ? widths[l - 1] : kInputs));
    node.bias = memory.floats(widths[l]);
    node.start = node.clamped || l == 1 ? memory.floats(kBatch * widths[l]) : nullptr;  // else the forward pass gives it
    node.phi = memory.floats(kBatch * widths[l]), node.delta = memory.floats(kBatch * widths[l]);
  }
  int64_t found[4];
  char why[400] = {};
  const int failed = run_cluster(nodes.data(), widths.data(), count, memory.floats(kBatch * kInputs), kInputs, kBatch, kSteps, momentum,
                                 differences, general, found, why, 399);
  std::printf("%s %d %d\n", why, static_cast<int>(found[0]), static_cast<int>(found[1]));
  return failed == 0;
}

}  // namespace

int main() {
  using pc::Activation;
  using pc::Energy;
  const Kind tanh{Activation::tanh, Energy::gaussian, Activation::identity};
  const Kind logits{Activation::identity, Energy::categorical, Activation::softmax};
  const Kind softmax{Activation::softmax, Energy::gaussian, Activation::identity};
  bool fine = run_network({40, 33, 10}, {softmax, softmax, softmax}, 0, true);
  fine = run_network({40, 150, 33, 10}, {tanh, tanh, tanh, tanh}, 0.5, true) && fine;  // bare
  fine = run_network({40, 150, 33, 40}, {tanh, tanh, tanh, tanh}, 0, false, true) && fine;
  fine = run_network({24, 70, 30, 10}, {tanh, logits, tanh, logits}, 0.5, false) && fine;
  fine = run_network({600, 640, 300, 40}, {tanh, logits, tanh, logits}, 0.5, true) && fine;  // rounds and parts
  fine = run_network({640, 640, 320, 10}, {tanh, logits, tanh, tanh}, 0.5, true) && fine;    // with a narrow layer
  return fine ? 0 : 1;
}
