// SPDX-License-Identifier: MIT
// How the nodes of one launch are shared out over blocks, and which lines a block works on; host and device.
#pragma once

#include <type_traits>

#include "../ops.h"
#include "node_lines.h"

namespace pc {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kWarpEntries = 1024;  // a warp's share at most: wider lines and samples are a block's

// A launch takes its nodes as a kernel argument: nothing to copy first, and a CUDA graph keeps them.
constexpr int kNodesPerLaunch = 64;

struct NodeTable {
  int64_t count, batch;
  int64_t first[kNodesPerLaunch + 1];  // block of a node's first sample; the last entry is the number of blocks
  NodeDesc nodes[kNodesPerLaunch];
  float* energy;   // (count, batch), or null
  float momentum;
};

struct Share {
  int64_t lines, length;  // of a sample
  bool by_warp;           // a warp per line, else the block
  bool many;              // a warp per sample, so kWarps samples in a block; else one
};

PC_HD bool by_row(Energy energy) { return energy == Energy::categorical || energy == Energy::gaussian_full; }

PC_HD Share share_of(const NodeDesc& node) {
  Share share;
  share.lines = by_row(node.energy) ? node.rows : 1;
  share.length = by_row(node.energy) ? node.width : node.rows * node.width;
  share.many = share.lines * share.length <= kWarpEntries;
  share.by_warp = share.many || (share.lines > 1 && share.length <= kWarpEntries);
  return share;
}

PC_HD int64_t samples_of_block(const Share& share) { return share.many ? kWarps : 1; }

// Lays the nodes onto blocks.
inline NodeTable table_of(const NodeDesc* nodes, int64_t count, int64_t batch, float* energy, double momentum) {
  NodeTable table{};
  table.count = count, table.batch = batch, table.energy = energy, table.momentum = static_cast<float>(momentum);
  for (int64_t l = 0; l < count; ++l) {
    const int64_t each = samples_of_block(share_of(nodes[l]));
    table.nodes[l] = nodes[l];
    table.first[l + 1] = table.first[l] + (batch + each - 1) / each;
  }
  return table;
}

PC_HD int64_t node_of_block(const NodeTable& table, int64_t block) {
  int64_t low = 0, high = table.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (table.first[middle] <= block ? low : high) = middle;
  }
  return low;
}

template <class S>
PC_HD Line<S> line_of(const NodeDesc& node, const Share& share, int64_t sample, int64_t row) {
  const bool halves = node.energy == Energy::gaussian_full, target_halves = halves && node.clamped;
  const int64_t phi_row = target_halves ? share.length / 2 : share.length, from = sample * node.phi_sample + row * phi_row;
  const int64_t mask_row = row * (node.index ? share.length : phi_row);
  Line<S> line{};
  line.n = share.length;
  line.phi = at(static_cast<const S*>(node.phi), from);
  line.mu = static_cast<const S*>(node.mu) + sample * node.mu_sample + row * share.length;
  line.log_var = static_cast<const S*>(node.log_var);
  line.index = at(node.index, sample * node.rows + row);
  line.mask = at(node.mask, sample * node.mask_sample + mask_row);
  line.hold = at(node.hold, sample * node.hold_sample + mask_row);
  line.grad_phi = at(static_cast<S*>(node.grad_phi), from);
  line.grad_mu = at(static_cast<S*>(node.grad_mu), sample * node.mu_sample + row * share.length);
  line.state = at(static_cast<S*>(node.state), from);
  line.velocity = at(static_cast<S*>(node.velocity), from);
  line.feedback = at(static_cast<const S*>(node.feedback), from);
  line.natural = node.natural;
  line.lr = static_cast<float>(node.lr);
  line.floor = node.energy == Energy::categorical_probs ? static_cast<float>(kProbabilityFloor) : -INFINITY;
  line.wide = (halves ? line.n / 2 : line.n) % kQuad == 0 && packs(line.phi) && packs(line.mu) && packs(line.log_var) &&
              packs(line.mask) && packs(line.hold) && packs(line.grad_phi) && packs(line.grad_mu) && packs(line.state) &&
              packs(line.velocity) && packs(line.feedback);
  return line;
}

template <class F, bool Clamped, class Team, class S>
PC_HD double family_errors(const Team& team, const Line<S>& line) {
  if constexpr (std::is_base_of_v<Elementwise, F>) {
    return entry_errors<F, Clamped>(team, line);
  } else if constexpr (std::is_same_v<F, GaussianFull>) {
    return pair_errors<Clamped>(team, line);
  } else if constexpr (!Clamped) {
    return categorical_errors(team, line);
  } else {
    return line.index ? indexed_errors(team, line) : target_errors(team, line);
  }
}

template <class Team, class S>
PC_HD double line_errors(const Team& team, Energy energy, bool clamped, const Line<S>& line) {
  switch (energy) {
#define PC_CASE(name, type) \
  case Energy::name: return clamped ? family_errors<type, true>(team, line) : family_errors<type, false>(team, line);
    PC_ENERGIES(PC_CASE)
#undef PC_CASE
  }
  return NAN;
}

template <class F, class Team, class S>
PC_HD void family_move(const Team& team, const Line<S>& line) {
  if constexpr (std::is_base_of_v<Elementwise, F>) {
    entry_move<F>(team, line);
  } else if constexpr (std::is_same_v<F, GaussianFull>) {
    pair_move(team, line);
  } else {
    categorical_move(team, line);
  }
}

template <class Team, class S>
PC_HD void line_move(const Team& team, Energy energy, const Line<S>& line) {
  if (line.natural) {  // along (phi - mu) + feedback, the form of a Gaussian node's step
    entry_move<Gaussian>(team, line);
    return;
  }
  switch (energy) {
#define PC_CASE(name, type) \
  case Energy::name: return family_move<type>(team, line);
    PC_ENERGIES(PC_CASE)
#undef PC_CASE
  }
}

// What one member of the block does. teams.line(share): the team that shares a line with it; teams.sum_of_warps(x): the sum of
// x over the block's warps, in their order, a barrier.
template <class S, class Teams>
PC_HD void errors_of_block(const NodeTable& table, int64_t block, const Teams& teams) {
  const int64_t l = node_of_block(table, block), at_block = block - table.first[l];
  const NodeDesc& node = table.nodes[l];
  const Share share = share_of(node);
  const auto team = teams.line(share.by_warp);
  const int64_t sample = share.many ? at_block * kWarps + teams.warp : at_block;
  double energy = 0;
  if (sample < table.batch) {
    const bool spread = share.by_warp && !share.many;  // the sample's lines over the block's warps
    for (int64_t row = spread ? teams.warp : 0; row < share.lines; row += spread ? kWarps : 1) {
      energy += line_errors(team, node.energy, node.clamped, line_of<S>(node, share, sample, row));
    }
  }
  if (!share.many && share.by_warp) energy = teams.sum_of_warps(energy);
  const bool speaks = team.rank == 0 && (share.many || teams.warp == 0) && sample < table.batch;
  if (speaks) table.energy[l * table.batch + sample] = static_cast<float>(energy);
}

template <class S, class Teams>
PC_HD void move_of_block(const NodeTable& table, int64_t block, const Teams& teams) {
  const int64_t l = node_of_block(table, block), at_block = block - table.first[l];
  const NodeDesc& node = table.nodes[l];
  const Share share = share_of(node);
  const auto team = teams.line(share.by_warp);
  const int64_t sample = share.many ? at_block * kWarps + teams.warp : at_block;
  if (sample >= table.batch) return;
  const bool spread = share.by_warp && !share.many;
  for (int64_t row = spread ? teams.warp : 0; row < share.lines; row += spread ? kWarps : 1) {
    Line<S> line = line_of<S>(node, share, sample, row);
    line.momentum = table.momentum;
    line_move(team, node.energy, line);
  }
}

}  // namespace pc
