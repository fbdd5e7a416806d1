// SPDX-License-Identifier: MIT
// Errors and moves of one line by a team of threads; host and device, so that the CPU tests run what the GPU runs.
//
// A line is one row of a sample, or all of the sample where its entries do not depend on each other. Every member of the team
// calls the function; member `rank` takes the quads rank, rank + size, ... A team has rank, size, sum(double) and max(float);
// both are barriers: what was read before them may be overwritten after them. Sums have a fixed order.
#pragma once

#include "../pc_math.h"
#include "quad.h"

namespace pc {

template <class S>
struct Line {
  int64_t n;  // entries of mu
  bool wide;  // quads in one access
  const S *phi, *mu, *log_var;
  const int64_t* index;  // one class, the target
  const uint8_t *mask, *hold;
  S *grad_phi, *grad_mu;  // null: not wanted

  S *state, *velocity;  // of a move: phi to be changed, and u or null
  const S* feedback;
  bool natural;
  float lr, momentum, floor;

  PC_HD Flags kept(int64_t i, int64_t end) const { return flagged(mask, 1, i, end, wide); }
  PC_HD Flags loose(int64_t i, int64_t end) const { return flagged(hold, 0, i, end, wide); }
};

template <class Team>
PC_HD int64_t first_of(const Team& team) {
  return static_cast<int64_t>(kQuad) * team.rank;
}
template <class Team>
PC_HD int64_t stride_of(const Team& team) {
  return static_cast<int64_t>(kQuad) * team.size;
}

PC_HD void clear_unless(const Flags& flags, Quad& x) {
  for (int j = 0; j < kQuad; ++j) x.x[j] = flags.on[j] ? x.x[j] : 0.0f;
}

// phi <- max(phi - lr u, floor), u <- momentum u + g + feedback, of the entries i..i+3 that are kept and not held
template <class S>
PC_HD void move_quad(const Line<S>& line, int64_t i, int64_t end, const Flags& kept, const Quad& g) {
  const Flags loose = line.loose(i, end);
  Quad phi = load(line.state, i, end, line.wide), u{}, back{};
  if (line.velocity != nullptr) u = load(line.velocity, i, end, line.wide);
  if (line.feedback != nullptr) back = load(line.feedback, i, end, line.wide);
  for (int j = 0; j < kQuad; ++j) {
    if (!kept.on[j] || !loose.on[j]) continue;
    u.x[j] = line.momentum * u.x[j] + (g.x[j] + back.x[j]);
    const float to = phi.x[j] - line.lr * u.x[j];
    phi.x[j] = to < line.floor ? line.floor : to;
  }
  store(phi, line.state, i, end, line.wide);
  store(u, line.velocity, i, end, line.wide);
}

// ---------------------------------------------------------------------------------------------------------------------
// families of single entries

template <class F, bool Clamped, class Team, class S>
PC_HD double entry_errors(const Team& team, const Line<S>& line) {
  double total = 0;
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    const Quad phi = load(line.phi, i, line.n, line.wide), mu = load(line.mu, i, line.n, line.wide);
    const Quad log_var = F::kLogVar ? load(line.log_var, i, line.n, line.wide) : Quad{};
    const Flags kept = line.kept(i, line.n), loose = line.loose(i, line.n);
    Quad grad_phi{}, grad_mu;
    for (int j = 0; j < kQuad; ++j) {
      Local<float> out;
      if constexpr (Clamped && F::kOwnTarget) {
        out = F::template target<kErrors>(phi.x[j], mu.x[j]);
      } else {
        out = F::template free<kErrors>(phi.x[j], mu.x[j], log_var.x[j]);
        grad_phi.x[j] = kept.on[j] && loose.on[j] ? out.grad_phi : 0.0f;
      }
      total += kept.on[j] ? out.energy : 0.0f;
      grad_mu.x[j] = kept.on[j] ? out.grad_mu : 0.0f;
    }
    if constexpr (!Clamped) store(grad_phi, line.grad_phi, i, line.n, line.wide);
    store(grad_mu, line.grad_mu, i, line.n, line.wide);
  }
  return team.sum(total);
}

template <class F, class Team, class S>
PC_HD void entry_move(const Team& team, const Line<S>& line) {
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    const Quad phi = load(line.phi, i, line.n, line.wide), mu = load(line.mu, i, line.n, line.wide);
    const Quad log_var = F::kLogVar ? load(line.log_var, i, line.n, line.wide) : Quad{};
    Quad g;
    for (int j = 0; j < kQuad; ++j) {
      g.x[j] = F::template free<kGradPhi>(phi.x[j], mu.x[j], log_var.x[j]).grad_phi;
    }
    move_quad(line, i, line.n, line.kept(i, line.n), g);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// gaussian_full: means in the first half of a line, log variances in the second

template <bool Clamped, class Team, class S>
PC_HD double pair_errors(const Team& team, const Line<S>& line) {
  const int64_t half = line.n / 2;
  double total = 0;
  for (int64_t i = first_of(team); i < half; i += stride_of(team)) {
    const Quad u = load(line.phi, i, half, line.wide), uh = load(line.mu, i, half, line.wide);
    const Quad s = Clamped ? Quad{} : load(at(line.phi, half), i, half, line.wide);
    const Quad sh = load(line.mu + half, i, half, line.wide);
    const Flags keep_u = line.kept(i, half);
    const Flags keep_s = Clamped ? keep_u : flagged(at(line.mask, half), 1, i, half, line.wide);
    Quad grad_u{}, grad_s{}, back_u, back_s;
    for (int j = 0; j < kQuad; ++j) {
      LocalPair<float> out;
      if constexpr (Clamped) {
        out = GaussianFull::target<kErrors>(u.x[j], uh.x[j], sh.x[j], keep_u.on[j]);
      } else {
        out = GaussianFull::free<kErrors>(u.x[j], s.x[j], uh.x[j], sh.x[j], keep_u.on[j], keep_s.on[j]);
        grad_u.x[j] = out.grad_phi_u, grad_s.x[j] = out.grad_phi_s;
      }
      total += i + j < half ? out.energy : 0.0f;
      back_u.x[j] = out.grad_mu_u, back_s.x[j] = out.grad_mu_s;
    }
    if constexpr (!Clamped) {
      clear_unless(line.loose(i, half), grad_u);
      clear_unless(flagged(at(line.hold, half), 0, i, half, line.wide), grad_s);
      store(grad_u, line.grad_phi, i, half, line.wide);
      store(grad_s, at(line.grad_phi, half), i, half, line.wide);
    }
    store(back_u, line.grad_mu, i, half, line.wide);
    store(back_s, at(line.grad_mu, half), i, half, line.wide);
  }
  return team.sum(total);
}

template <class Team, class S>
PC_HD void pair_move(const Team& team, const Line<S>& line) {
  const int64_t half = line.n / 2;
  Line<S> variances = line;
  variances.state += half;
  variances.velocity = at(line.velocity, half);
  variances.feedback = at(line.feedback, half);
  variances.hold = at(line.hold, half);
  for (int64_t i = first_of(team); i < half; i += stride_of(team)) {
    const Quad u = load(line.phi, i, half, line.wide), s = load(line.phi + half, i, half, line.wide);
    const Quad uh = load(line.mu, i, half, line.wide), sh = load(line.mu + half, i, half, line.wide);
    Quad to_u, to_s;
    for (int j = 0; j < kQuad; ++j) {
      const LocalPair<float> out = GaussianFull::free<kGradPhi>(u.x[j], s.x[j], uh.x[j], sh.x[j], true, true);
      to_u.x[j] = out.grad_phi_u, to_s.x[j] = out.grad_phi_s;
    }
    move_quad(line, i, half, line.kept(i, half), to_u);
    move_quad(variances, i, half, flagged(at(line.mask, half), 1, i, half, line.wide), to_s);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// categorical: the statistics of a row first, then everything from them

// p_i = e^(x_i - max) scale, ln p_i = x_i - max - log_sum
struct RowSoftmax {
  float max, scale, log_sum;
  PC_HD float p(bool kept, float x) const { return kept ? exp(x - max) * scale : 0.0f; }
  PC_HD float log_p(float x) const { return (x - max) - log_sum; }
};

template <class Team, class S>
PC_HD RowSoftmax row_softmax(const Team& team, const Line<S>& line, const S* x) {
  float most = -INFINITY;
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    const Quad got = load(x, i, line.n, line.wide);
    const Flags kept = line.kept(i, line.n);
    for (int j = 0; j < kQuad; ++j) most = kept.on[j] && got.x[j] > most ? got.x[j] : most;
  }
  most = team.max(most);
  double sum = 0;
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    const Quad got = load(x, i, line.n, line.wide);
    const Flags kept = line.kept(i, line.n);
    for (int j = 0; j < kQuad; ++j) sum += kept.on[j] ? exp(got.x[j] - most) : 0.0f;
  }
  sum = team.sum(sum);
  return {most, static_cast<float>(1 / sum), static_cast<float>(::log(sum))};
}

// ln(p/q) entry by entry, exact also where p and q agree
struct RowRatio {
  RowSoftmax top, bottom;
  float shift, offset, correction;

  PC_HD float rounded(float phi, float mu) const { return phi - mu - shift - offset; }  // apart: a large shift rounds nothing
  PC_HD float log_ratio(bool kept, float phi, float mu) const { return kept ? rounded(phi, mu) - correction : 0.0f; }
};

template <class Team, class S>
PC_HD RowRatio row_ratio(const Team& team, const Line<S>& line) {
  RowRatio row{row_softmax(team, line, line.phi), row_softmax(team, line, line.mu), 0, 0, 0};
  row.shift = row.top.max - row.bottom.max;
  row.offset = row.top.log_sum - row.bottom.log_sum;
  double changed = 0;
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    const Quad phi = load(line.phi, i, line.n, line.wide), mu = load(line.mu, i, line.n, line.wide);
    const Flags kept = line.kept(i, line.n);
    for (int j = 0; j < kQuad; ++j) {
      if (!kept.on[j]) continue;
      const float p = row.top.p(true, phi.x[j]), q = row.bottom.p(true, mu.x[j]);
      changed += Categorical::change(p, q, row.rounded(phi.x[j], mu.x[j]));
    }
  }
  row.correction = log1p(static_cast<float>(team.sum(changed)));
  return row;
}

template <class Team, class S>
PC_HD double row_energy(const Team& team, const Line<S>& line, const RowRatio& row) {  // and dE/dmu on the way
  double total = 0;
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    const Quad phi = load(line.phi, i, line.n, line.wide), mu = load(line.mu, i, line.n, line.wide);
    const Flags kept = line.kept(i, line.n);
    Quad grad_mu{};
    for (int j = 0; j < kQuad; ++j) {
      if (!kept.on[j]) continue;
      const float p = row.top.p(true, phi.x[j]), q = row.bottom.p(true, mu.x[j]);
      const Local<float> out = Categorical::free<kErrors>(p, q, row.log_ratio(true, phi.x[j], mu.x[j]));
      total += out.energy;
      grad_mu.x[j] = out.grad_mu;
    }
    store(grad_mu, line.grad_mu, i, line.n, line.wide);
  }
  return team.sum(total);
}

// dE/dphi of the entries i..i+3, to be given to `use(i, kept, gradient)`
template <class Team, class S, class Use>
PC_HD void row_grad_phi(const Team& team, const Line<S>& line, const RowRatio& row, float energy, const Use& use) {
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    const Quad phi = load(line.phi, i, line.n, line.wide), mu = load(line.mu, i, line.n, line.wide);
    const Flags kept = line.kept(i, line.n);
    Quad g;
    for (int j = 0; j < kQuad; ++j) {
      const float p = row.top.p(kept.on[j], phi.x[j]), ratio = row.log_ratio(kept.on[j], phi.x[j], mu.x[j]);
      g.x[j] = kept.on[j] ? Categorical::grad_phi(p, ratio, energy) : 0.0f;
    }
    use(i, kept, g);
  }
}

template <class Team, class S>
PC_HD double categorical_errors(const Team& team, const Line<S>& line) {
  const RowRatio row = row_ratio(team, line);
  const double energy = row_energy(team, line, row);
  if (line.grad_phi == nullptr) return energy;
  row_grad_phi(team, line, row, static_cast<float>(energy), [&](int64_t i, const Flags&, Quad g) {
    clear_unless(line.loose(i, line.n), g);
    store(g, line.grad_phi, i, line.n, line.wide);
  });
  return energy;
}

template <class Team, class S>
PC_HD void categorical_move(const Team& team, const Line<S>& line) {
  const RowRatio row = row_ratio(team, line);
  const float energy = static_cast<float>(row_energy(team, line, row));
  row_grad_phi(team, line, row, energy,
               [&](int64_t i, const Flags& kept, const Quad& g) { move_quad(line, i, line.n, kept, g); });
}

// The target is a class. One outside [0, n) makes the energy NaN: reading past the row would be worse.
template <class Team, class S>
PC_HD double indexed_errors(const Team& team, const Line<S>& line) {
  const RowSoftmax row = row_softmax(team, line, line.mu);
  const int64_t k = *line.index;
  const bool known = k >= 0 && k < line.n;
  const bool counts = !known || line.mask == nullptr || line.mask[k];  // a masked class: nothing is left to predict
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    const Quad mu = load(line.mu, i, line.n, line.wide);
    const Flags kept = line.kept(i, line.n);
    Quad grad_mu;
    for (int j = 0; j < kQuad; ++j) {
      const float q = row.p(kept.on[j] && counts, mu.x[j]);
      grad_mu.x[j] = i + j == k && counts ? q - 1 : q;
    }
    store(grad_mu, line.grad_mu, i, line.n, line.wide);
  }
  if (!known) return NAN;
  return counts ? -row.log_p(widen(line.mu[k])) : 0.0f;
}

// The target is a row of probabilities.
template <class Team, class S>
PC_HD double target_errors(const Team& team, const Line<S>& line) {
  const RowSoftmax row = row_softmax(team, line, line.mu);
  double mass = 0, total = 0;
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    Quad o = load(line.phi, i, line.n, line.wide);
    clear_unless(line.kept(i, line.n), o);
    for (int j = 0; j < kQuad; ++j) mass += o.x[j];
  }
  const float sum = static_cast<float>(team.sum(mass));
  for (int64_t i = first_of(team); i < line.n; i += stride_of(team)) {
    Quad o = load(line.phi, i, line.n, line.wide), grad_mu;
    const Quad mu = load(line.mu, i, line.n, line.wide);
    const Flags kept = line.kept(i, line.n);
    clear_unless(kept, o);
    for (int j = 0; j < kQuad; ++j) {
      const float q = row.p(kept.on[j], mu.x[j]);
      const Local<float> out = Categorical::target<kErrors>(o.x[j], q, row.log_p(mu.x[j]), sum);
      total += out.energy;
      grad_mu.x[j] = out.grad_mu;
    }
    store(grad_mu, line.grad_mu, i, line.n, line.wide);
  }
  return team.sum(total);
}

}  // namespace pc
