// SPDX-License-Identifier: MIT
// The loops vectorise as they stand (no intrinsics); the float kernels are compiled for several instruction sets.
#include "node_kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "clones.h"

namespace pc {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// the kernels: energy of a sample, gradients on the way. W says what is wanted, Clamped that phi is the target.

template <class F, int W, bool Clamped, class T>
PC_HD double entry_family(const View<T>& v) {
  const int64_t size = v.rows * v.width;
  double total = 0;
  for (int64_t start = 0; start < size; start += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, size - start));
    const T *phi = v.phi + start, *mu = v.mu + start, *log_var = at(v.log_var, start);
    T *grad_phi = at(v.grad_phi, start), *grad_mu = at(v.grad_mu, start);
    T energy[kBlock];
    PC_INDEPENDENT
    for (int i = 0; i < n; ++i) {
      Local<T> out;
      if constexpr (Clamped && F::kOwnTarget) {
        out = F::template target<W>(phi[i], mu[i]);
      } else {
        out = F::template free<W>(phi[i], mu[i], F::kLogVar ? log_var[i] : T(0));
      }
      if constexpr (W & kEnergy) energy[i] = out.energy;
      if constexpr (W & kGradPhi) grad_phi[i] = out.grad_phi;
      if constexpr (W & kGradMu) grad_mu[i] = out.grad_mu;
    }
    const uint8_t* mask = at(v.mask, start);
    if constexpr (W & kGradPhi) zero_where(0, mask, n, grad_phi);
    if constexpr (W & kGradMu) zero_where(0, mask, n, grad_mu);
    if constexpr (W & kEnergy) {
      zero_where(0, mask, n, energy);
      total += tree_sum(energy, n);
    }
  }
  return total;
}

template <int W, bool Clamped, bool Masked, bool Prior, class T>
PC_HD double pair_row(const View<T>& v, int64_t row) {
  const int64_t half = v.width / 2;
  const T *u = v.phi + row * v.phi_width, *s = u + half, *uh = v.mu + row * v.width, *sh = uh + half;
  T *grad_phi = at(v.grad_phi, row * v.phi_width), *grad_mu = at(v.grad_mu, row * v.width);
  const uint8_t* mask = at(v.mask, row * v.phi_width);
  return row_sum<T>(half, [=](int64_t i) {
    LocalPair<T> out;
    const bool keep = !Masked || mask[i];
    if constexpr (Clamped) {
      out = GaussianFull::target<W>(u[i], uh[i], sh[i], keep);
    } else {
      const bool keep_s = !Masked || mask[half + i];
      out = GaussianFull::free<W>(u[i], s[i], uh[i], sh[i], keep, keep_s);
      if constexpr (Prior) {
        const LocalPair<T> prior = GaussianFull::free<W & ~kGradMu>(u[i], s[i], T(0), T(0), keep, keep_s);
        if constexpr (W & kEnergy) out.energy += v.prior * prior.energy;
        if constexpr (W & kGradPhi) out.grad_phi_u += v.prior * prior.grad_phi_u, out.grad_phi_s += v.prior * prior.grad_phi_s;
      }
    }
    if constexpr (W & kGradPhi) grad_phi[i] = out.grad_phi_u, grad_phi[half + i] = out.grad_phi_s;
    if constexpr (W & kGradMu) grad_mu[i] = out.grad_mu_u, grad_mu[half + i] = out.grad_mu_s;
    return out.energy;
  });
}

// The categorical kernels take a view of at most kRowsAtOnce rows.

template <int W, class T>
PC_HD double free_categorical(const View<T>& v) {
  const int64_t n = v.width;
  const int rows = static_cast<int>(v.rows);
  T *p = v.room, *q = p + rows * n, *log_ratio = q + rows * n;
  categorical_rows(rows, n, v.phi, v.mu, v.mask, p, q, log_ratio);
  constexpr int kWant = W & kGradPhi ? W | kEnergy : W;  // dE/dphi needs the row's energy
  double energy[kRowsAtOnce], total = 0;
  for (int r = 0; r < rows; ++r) {
    const T *p_r = p + r * n, *q_r = q + r * n, *ratio = log_ratio + r * n;
    T* grad_mu = at(v.grad_mu, r * n);
    if constexpr (kWant & kEnergy) {
      energy[r] = row_sum<T>(n, [=](int64_t i) {
        const Local<T> out = Categorical::free<kWant>(p_r[i], q_r[i], ratio[i]);
        if constexpr (W & kGradMu) grad_mu[i] = out.grad_mu;
        return out.energy;
      });
      total += energy[r];
    } else {
      each(n, [=](int64_t i) { grad_mu[i] = Categorical::free<kWant>(p_r[i], q_r[i], ratio[i]).grad_mu; });
    }
  }
  for (int r = 0; W & kGradPhi && r < rows; ++r) {
    const T mean = static_cast<T>(energy[r]), *p_r = p + r * n, *ratio = log_ratio + r * n;
    T* grad_phi = v.grad_phi + r * n;
    each(n, [=](int64_t i) { grad_phi[i] = Categorical::grad_phi(p_r[i], ratio[i], mean); });
  }
  return total;
}

template <int W, class T>
PC_HD double indexed_categorical(const View<T>& v) {
  const int64_t n = v.width;
  const int rows = static_cast<int>(v.rows);
  T* q = W & kGradMu ? v.grad_mu : v.room;
  SoftmaxRow<T> stats[kRowsAtOnce];
  softmax_rows(rows, n, visible(rows * n, v.mu, v.mask, q), q, stats);
  double total = 0;
  for (int r = 0; r < rows; ++r) {
    const int64_t k = r * n + v.index[r];
    if (v.mask != nullptr && !v.mask[k]) {  // the only class of the target takes no part: nothing is left to predict
      if constexpr (W & kGradMu) std::fill_n(q + r * n, n, T(0));
      continue;
    }
    if constexpr (W & kGradMu) q[k] -= 1;
    total -= (v.mu[k] - stats[r].max) - stats[r].log_sum;
  }
  return total;
}

template <int W, class T>
PC_HD double target_categorical(const View<T>& v) {
  const int64_t n = v.width;
  const int rows = static_cast<int>(v.rows);
  T *q = v.room, *o = q + rows * n, *log_q = o + rows * n;
  SoftmaxRow<T> stats[kRowsAtOnce];
  softmax_rows(rows, n, visible(rows * n, v.mu, v.mask, q), q, stats);
  double total = 0;
  for (int r = 0; r < rows; ++r) {
    const SoftmaxRow<T> row = stats[r];
    const T *target = v.phi + r * n, *mu = v.mu + r * n, *q_r = q + r * n;
    T *o_r = o + r * n, *log_q_r = log_q + r * n, *grad_mu = at(v.grad_mu, r * n);
    each(n, [=](int64_t i) { o_r[i] = target[i], log_q_r[i] = (mu[i] - row.max) - row.log_sum; });
    zero_where(0, at(v.mask, r * n), n, o_r);
    const T sum = static_cast<T>(row_sum<T>(n, [=](int64_t i) { return o_r[i]; }));
    total += row_sum<T>(n, [=](int64_t i) {
      const Local<T> out = Categorical::target<W>(o_r[i], q_r[i], log_q_r[i], sum);
      if constexpr (W & kGradMu) grad_mu[i] = out.grad_mu;
      return out.energy;
    });
  }
  return total;
}

template <int W, bool Clamped, class T>
PC_HD double categorical(const View<T>& v) {
  if constexpr (!Clamped) {
    return free_categorical<W>(v);
  } else {
    return v.index ? indexed_categorical<W>(v) : target_categorical<W>(v);
  }
}

// `rows` rows from `row` on.
template <class T>
PC_HD View<T> rows_of(View<T> v, int64_t row, int64_t rows) {
  v.rows = rows;
  v.phi = at(v.phi, row * v.phi_width), v.grad_phi = at(v.grad_phi, row * v.phi_width);
  v.mu += row * v.width, v.grad_mu = at(v.grad_mu, row * v.width);
  v.index = at(v.index, row), v.mask = at(v.mask, row * v.width);
  return v;
}

template <class F, int W, bool Clamped, class T>
PC_HD double row_family(const View<T>& v) {
  double total = 0;
  if constexpr (std::is_same_v<F, GaussianFull>) {
    for (int64_t row = 0; row < v.rows; ++row) {
      if (v.prior != 0) {
        total += v.mask ? pair_row<W, Clamped, true, true>(v, row) : pair_row<W, Clamped, false, true>(v, row);
      } else {
        total += v.mask ? pair_row<W, Clamped, true, false>(v, row) : pair_row<W, Clamped, false, false>(v, row);
      }
    }
  } else {
    const int64_t group = rows_at_once(v.width);
    for (int64_t row = 0; row < v.rows; row += group) {
      total += categorical<W, Clamped>(rows_of(v, row, std::min(group, v.rows - row)));
    }
  }
  return total;
}

template <class F, int W, bool Clamped, class T>
PC_HD double sample_energy(const View<T>& v) {
  if constexpr (std::is_base_of_v<Elementwise, F>) {
    return entry_family<F, W, Clamped>(v);
  } else {
    return row_family<F, W, Clamped>(v);
  }
}

template <class F, class T>
PC_HD double by_form(const View<T>& v, Form form) {
  switch (form) {
    case Form::kErrors: return sample_energy<F, kErrors, false>(v);
    case Form::kEnergy: return sample_energy<F, kEnergy, false>(v);
    case Form::kGradPhi: return sample_energy<F, kGradPhi, false>(v);
    case Form::kGradMu: return sample_energy<F, kGradMu, false>(v);
    case Form::kDeltas: return sample_energy<F, kEnergy | kGradMu, false>(v);
    case Form::kTargetErrors: return sample_energy<F, kEnergy | kGradMu, true>(v);
    case Form::kTargetGradMu: return sample_energy<F, kGradMu, true>(v);
    default: return sample_energy<F, kEnergy, true>(v);
  }
}

// g <- phi - mu, plus the feedback where there is one
template <class T>
PC_HD void subtract_row(int64_t n, const T* phi, const T* mu, const T* feedback, T* g) {
  if (feedback == nullptr) {
    PC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) g[i] = phi[i] - mu[i];
  } else {
    PC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) g[i] = (phi[i] - mu[i]) + feedback[i];
  }
}

template <class T>
PC_HD void add_row(int64_t n, const T* feedback, T* g) {
  PC_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) g[i] += feedback[i];
}

// phi and velocity of a sample along `g`; `moves`: which entries, null for all.
template <bool Some, class T>
PC_HD void move_entries(int64_t n, const T* g, const uint8_t* moves, T lr, T momentum, T floor, T* phi, T* velocity) {
  PC_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const T u = velocity ? momentum * velocity[i] + g[i] : g[i], to = phi[i] - lr * u, kept = to < floor ? floor : to;
    if (velocity) velocity[i] = Some ? pick(moves[i], u, velocity[i]) : u;
    phi[i] = Some ? pick(moves[i], kept, phi[i]) : kept;
  }
}

}  // namespace

// One function per family and type, so that it can be compiled for several instruction sets. Not in the unnamed namespace:
// the run-time choice needs a symbol.
namespace kernel {
#define PC_KERNEL(name, type)                                                                                        \
  PC_CLONES static double name(const View<float>& v, Form form) { return by_form<type>(v, form); }                  \
  static double name(const View<double>& v, Form form) { return by_form<type>(v, form); }
PC_ENERGIES(PC_KERNEL)
#undef PC_KERNEL
}  // namespace kernel

namespace {

template <class T>
using Kernel = double (*)(const View<T>&, Form);

template <class T>
Kernel<T> kernel_of(Energy energy) {
#define PC_ENTRY(name, type) kernel::name,
  static constexpr Kernel<T> table[] = {PC_ENERGIES(PC_ENTRY)};
#undef PC_ENTRY
  return table[static_cast<int>(energy)];
}

}  // namespace

namespace kernel {
PC_CLONES static void move_some(int64_t n, const float* g, const uint8_t* moves, float lr, float momentum, float floor,
                                float* phi, float* velocity) {
  move_entries<true>(n, g, moves, lr, momentum, floor, phi, velocity);
}
static void move_some(int64_t n, const double* g, const uint8_t* moves, double lr, double momentum, double floor, double* phi,
                      double* velocity) {
  move_entries<true>(n, g, moves, lr, momentum, floor, phi, velocity);
}
PC_CLONES static void move_all(int64_t n, const float* g, float lr, float momentum, float floor, float* phi, float* velocity) {
  move_entries<false>(n, g, nullptr, lr, momentum, floor, phi, velocity);
}
static void move_all(int64_t n, const double* g, double lr, double momentum, double floor, double* phi, double* velocity) {
  move_entries<false>(n, g, nullptr, lr, momentum, floor, phi, velocity);
}
PC_CLONES static void subtract(int64_t n, const float* phi, const float* mu, const float* feedback, float* g) {
  subtract_row(n, phi, mu, feedback, g);
}
static void subtract(int64_t n, const double* phi, const double* mu, const double* feedback, double* g) {
  subtract_row(n, phi, mu, feedback, g);
}
PC_CLONES static void add(int64_t n, const float* feedback, float* g) { add_row(n, feedback, g); }
static void add(int64_t n, const double* feedback, double* g) { add_row(n, feedback, g); }
}  // namespace kernel

template <class T>
double run_node(Energy energy, const View<T>& v, Form form) {
  return kernel_of<T>(energy)(v, form);
}

template <class T>
void direction(Energy energy, bool natural, View<T> v, int64_t n, const T* feedback, T* g) {
  if (natural || (energy == Energy::gaussian && v.mask == nullptr)) {  // the same form (the README's section 2)
    kernel::subtract(n, v.phi, v.mu, feedback, g);
    return;
  }
  v.grad_phi = g;
  run_node(energy, v, Form::kGradPhi);
  if (feedback != nullptr) kernel::add(n, feedback, g);
}

// The entries that move, in `flags`; null when all do.
const uint8_t* moving(const uint8_t* mask, const uint8_t* hold, int64_t n, uint8_t* flags) {
  if (mask == nullptr && hold == nullptr) return nullptr;
  for (int64_t i = 0; i < n; ++i) flags[i] = (mask ? mask[i] : 1) & (hold ? hold[i] ^ 1 : 1);
  return flags;
}

template <class T>
void move_row(int64_t n, const T* g, const uint8_t* moves, T lr, T momentum, T floor, T* phi, T* velocity) {
  if (moves == nullptr) {
    kernel::move_all(n, g, lr, momentum, floor, phi, velocity);
  } else {
    kernel::move_some(n, g, moves, lr, momentum, floor, phi, velocity);
  }
}

#define PC_INSTANCE(T)                                                                     \
  template double run_node<T>(Energy, const View<T>&, Form);                               \
  template void direction<T>(Energy, bool, View<T>, int64_t, const T*, T*);                \
  template void move_row<T>(int64_t, const T*, const uint8_t*, T, T, T, T*, T*);
PC_INSTANCE(float)
PC_INSTANCE(double)
#undef PC_INSTANCE

}  // namespace pc
