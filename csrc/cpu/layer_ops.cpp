// SPDX-License-Identifier: MIT
// layer_errors and update_phi on the CPU: all nodes in one parallel region, one pass over the data of a node.
//
// The unit of work is one sample of one node; nothing is summed across units and sums have a fixed order, so results do not
// depend on the number of threads. The loops vectorise as they stand (no intrinsics); the float kernels are compiled for
// several instruction sets and chosen when the module is loaded.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../ops.h"
#include "node_kernels.h"

namespace pc {
namespace {

// About the nanoseconds that a thousand entries take, for sharing out the work.
int64_t cost(const NodeDesc& node) {
  constexpr int64_t weight[] = {1, 2, 3, 8, 4, 8, 2, 3};
  return 16 + node.rows * node.width * weight[static_cast<int>(node.energy)];
}

constexpr int64_t kGrain = 40000;  // less than this is done by the calling thread alone: waking the pool costs more

// run(node, sample, room) for every pair. The work is laid on a line, a sample as long as its cost; a thread takes those that
// begin in its stretch. `room` is the thread's own.
template <class T, class Run>
void for_each_sample(const NodeDesc* nodes, int64_t count, int64_t batch, int64_t room_size, const Run& run) {
  std::vector<int64_t> first(count + 1, 0);
  for (int64_t l = 0; l < count; ++l) first[l + 1] = first[l] + batch * cost(nodes[l]);
  at::parallel_for(0, first[count], kGrain, [&](int64_t begin, int64_t end) {
    std::vector<T> room(room_size);
    for (int64_t l = 0; l < count; ++l) {
      const int64_t each = cost(nodes[l]);
      const auto from = [&](int64_t place) {
        return std::clamp<int64_t>((place - first[l] + each - 1) / each, 0, batch);
      };
      if (end <= first[l] || begin >= first[l + 1]) continue;
      for (int64_t b = from(std::max(begin, first[l])); b < from(end); ++b) run(l, b, room.data());
    }
  });
}

template <class T>
View<T> view_of(const NodeDesc& node, int64_t b, T* room) {
  View<T> v;
  v.rows = node.rows;
  v.width = node.width;
  v.phi_width = node.rows == 0 ? 0 : node.phi_sample / node.rows;
  v.phi = at(static_cast<const T*>(node.phi), b * node.phi_sample);
  v.mu = static_cast<const T*>(node.mu) + b * node.mu_sample;
  v.log_var = static_cast<const T*>(node.log_var);
  v.index = at(node.index, b * node.rows);
  v.mask = at(node.mask, b * node.mask_sample);
  v.hold = at(node.hold, b * node.hold_sample);
  v.grad_phi = at(static_cast<T*>(node.grad_phi), b * node.phi_sample);
  v.grad_mu = at(static_cast<T*>(node.grad_mu), b * node.mu_sample);
  v.room = room;
  return v;
}

int64_t room_for(const NodeDesc* nodes, int64_t count) {
  int64_t most = 0;
  for (int64_t l = 0; l < count; ++l) {
    if (nodes[l].energy == Energy::categorical) most = std::max(most, row_room(nodes[l].width));
  }
  return most;
}

Form form_of(const NodeDesc& node, bool with_energy) {
  if (node.clamped) return !node.grad_mu ? Form::kTargetEnergy : with_energy ? Form::kTargetErrors : Form::kTargetGradMu;
  if (node.grad_phi) return Form::kErrors;
  return !node.grad_mu ? Form::kEnergy : with_energy ? Form::kDeltas : Form::kGradMu;
}

template <class T>
void errors_of_sample(const NodeDesc& node, int64_t b, T* room, T* energy) {
  const View<T> v = view_of(node, b, room);
  const double found = run_node(node.energy, v, form_of(node, energy != nullptr));
  if (energy != nullptr) *energy = static_cast<T>(found);
  if (!node.clamped) zero_where(1, v.hold, node.phi_sample, v.grad_phi);
}

template <class T>
void move_sample(const NodeDesc& node, int64_t b, T momentum, T* g, T* room) {
  const int64_t n = node.phi_sample;
  const View<T> v = view_of(node, b, room);
  direction(node.energy, node.natural, v, n, at(static_cast<const T*>(node.feedback), b * n), g);
  T* phi = static_cast<T*>(node.state) + b * n;
  T* velocity = at(static_cast<T*>(node.velocity), b * n);
  const T floor = node.energy == Energy::categorical_probs ? T(kProbabilityFloor) : T(-INFINITY);
  const uint8_t* moves = moving(v.mask, v.hold, n, reinterpret_cast<uint8_t*>(g + n));
  move_row(n, g, moves, T(node.lr), momentum, floor, phi, velocity);
}

}  // namespace

template <class T>
void layer_errors_cpu(const NodeDesc* nodes, int64_t count, int64_t batch, T* energy) {
  for_each_sample<T>(nodes, count, batch, room_for(nodes, count), [=](int64_t l, int64_t b, T* room) {
    errors_of_sample(nodes[l], b, room, at(energy, l * batch + b));
  });
}

template <class T>
void update_phi_cpu(const NodeDesc* nodes, int64_t count, int64_t batch, double momentum) {
  int64_t most = 0;
  for (int64_t l = 0; l < count; ++l) most = std::max(most, nodes[l].phi_sample);
  const int64_t rows = room_for(nodes, count);  // then a sample's direction and, a byte each, which entries move
  for_each_sample<T>(nodes, count, batch, rows + 2 * most, [=](int64_t l, int64_t b, T* room) {
    move_sample(nodes[l], b, static_cast<T>(momentum), room + rows, room);
  });
}

template void layer_errors_cpu<float>(const NodeDesc*, int64_t, int64_t, float*);
template void layer_errors_cpu<double>(const NodeDesc*, int64_t, int64_t, double*);
template void update_phi_cpu<float>(const NodeDesc*, int64_t, int64_t, double);
template void update_phi_cpu<double>(const NodeDesc*, int64_t, int64_t, double);

}  // namespace pc
