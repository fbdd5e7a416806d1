// SPDX-License-Identifier: MIT
// Schedule (a) on the CPU: a block after the other, its threads as loops; same plan, same body, the launches in their order.
#include "cuda/layers_body.h"

#include <cstring>
#include <memory>
#include <vector>

#include "threads.h"

namespace {

float rounded(float x, pc::Products products) {
  if (products == pc::Products::tf32) return pc::operand<pc::Products::tf32>(x);
  return products == pc::Products::bf16 ? pc::operand<pc::Products::bf16>(x) : x;  // what is bfloat16 already stays
}

template <class T>
struct Block {
  mutable float sums[pc::kRowsOfTile][pc::kColumnsOfTile];

  template <bool Across>
  void multiply(const T* left, int64_t left_pitch, const T* right, int64_t right_pitch, int64_t inner, pc::Products products) const {
    for (int m = 0; m < pc::kRowsOfTile; ++m) {
      for (int n = 0; n < pc::kColumnsOfTile; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < inner; ++k) {
          const float x = pc::widen(left[m * left_pitch + k]), w = pc::widen(Across ? right[k * right_pitch + n] : right[n * right_pitch + k]);
          sum += rounded(x, products) * rounded(w, products);
        }
        sums[m][n] = sum;
      }
    }
  }
  void multiply_rounded(const T* left, int64_t left_pitch, const T* right, int64_t right_pitch, int64_t inner, pc::Products products) const {
    multiply<false>(left, left_pitch, right, right_pitch, inner, products);
  }
  template <class F>
  void quads(const F& f) const {
    for (int row = 0; row < pc::kRowsOfTile; ++row) {
      for (int column = 0; column < pc::kColumnsOfTile; column += 4) {
        const pc::Four x = {sums[row][column], sums[row][column + 1], sums[row][column + 2], sums[row][column + 3]};
        f(row, column, x);
      }
    }
  }
};

struct Alone {  // the team of one thread
  int rank = 0, size = 1;
  double sum(double x) const { return x; }
  float max(float x) const { return x; }
  void sync() const {}
};

template <class T>
struct Launches {
  const pc::LayersRun& run;
  bool reverse;

  void phase(pc::Phase phase, int64_t t) const {
    const pc::LayersBody<T> body{run, t};
    int64_t blocks = 0;
    for (int64_t l = 0; l < run.count; ++l) blocks += pc::blocks_of(run, phase, l, t);
    for (int64_t i = 0; i < blocks; ++i) {
      body.find(phase, reverse ? blocks - 1 - i : i, [&](int64_t l, int64_t some) { block(body, phase, l, some); });
    }
  }
  void block(const pc::LayersBody<T>& body, pc::Phase phase, int64_t l, int64_t some) const {
    Block<T> tile{};
    for (auto& row : tile.sums) std::fill(std::begin(row), std::end(row), NAN);  // what is not a product is not read
    if (phase == pc::Phase::predict) return body.predict(tile, l, some);
    if (phase == pc::Phase::update) return body.update(tile, l, some);
    for (int64_t m = some * pc::kRowsOfBlock; m < std::min(run.batch, (some + 1) * pc::kRowsOfBlock); ++m) {
      if (phase == pc::Phase::predict_rows) body.predict_row(Alone{}, l, m);
      else body.update_row(Alone{}, l, m);
    }
  }
  void start(int64_t l) const {
    const pc::LayersBody<T> body{run, 0};
    const int64_t tiles = pc::tiles_of(run, run.plan[l].width);
    for (int64_t i = 0; i < tiles; ++i) body.start(Block<float>{}, l, reverse ? tiles - 1 - i : i);
    for (int64_t m = 0; body.by_rows(l) && m < run.batch; ++m) body.start_row(Alone{}, l, reverse ? run.batch - 1 - m : m);
  }
  void trace(int64_t t) const {
    if (run.energy == nullptr) return;
    pc::NodeDesc nodes[pc::kMaxLayers];
    pc::nodes_of_trace(run, nodes);
    const pc::NodeTable table = pc::table_of(nodes, run.count, run.batch, run.energy + t * run.count * run.batch, 0);
    for (int64_t block = 0; block < table.first[run.count]; ++block) {
      host::run_block([&](const auto& teams) { pc::errors_of_block<float>(table, block, teams); });
    }
  }
  void all() const {
    const pc::LayersBody<T> body{run, run.steps};
    for (int64_t i = 0; i < run.batch * run.plan[0].inputs; ++i) body.copy_x(i / run.plan[0].inputs, i % run.plan[0].inputs);
    for (int64_t l = 0; l < run.count; ++l) {
      const int64_t inputs = run.plan[l].inputs;
      for (int64_t i = 0; i < run.plan[l].width * inputs; ++i) body.copy_weight(l, i / inputs, i % inputs);
    }
    for (int64_t l = 0; l < run.count; ++l) start(l);
    for (int64_t t = 0; t <= run.steps; ++t) {
      phase(pc::Phase::predict, t), phase(pc::Phase::predict_rows, t), trace(t);
      if (t < run.steps) phase(pc::Phase::update, t), phase(pc::Phase::update_rows, t);
    }
    for (int64_t l = run.count - 1; l >= 0; --l) {
      for (int64_t i = 0; !run.nodes[l].clamped && i < run.batch * run.plan[l].width; ++i) {
        if (!body.copy_out(l, i / run.plan[l].width, i % run.plan[l].width)) *run.diverged = l + 1;
      }
    }
  }
};

}  // namespace

extern "C" int64_t size_of_layers_node() { return sizeof(pc::LayersNode); }
extern "C" int64_t size_of_layers_run() { return sizeof(pc::LayersRun); }

// The plan alone: 0 and the plan in `run`; or 1 and, in `why`, the reason.
extern "C" int plan_layers(const pc::LayersNode* nodes, int64_t inputs, const int64_t* widths, int64_t count, int64_t batch,
                           double momentum, int products, pc::LayersRun* run, char* why, int64_t room) {
  run->count = count, run->batch = batch, run->products = static_cast<pc::Products>(products);
  run->momentum = static_cast<float>(momentum), run->momentum_on = momentum != 0;
  std::copy(nodes, nodes + count, run->nodes);
  const std::string said = pc::plan_layers(inputs, widths, *run);
  std::strncpy(why, said.c_str(), room - 1);
  return said.empty() ? 0 : 1;
}

// 0 and the results in the nodes' phi and delta, in energy and in diverged
extern "C" int run_layers(const pc::LayersNode* nodes, const float* x, int64_t inputs, const int64_t* widths, int64_t count,
                          int64_t batch, int64_t steps, double momentum, int products, bool reverse, float* energy, int64_t* diverged, char* why,
                          int64_t room) {
  const auto run = std::make_unique<pc::LayersRun>();
  run->steps = steps;
  run->x = x;
  if (plan_layers(nodes, inputs, widths, count, batch, momentum, products, run.get(), why, room) != 0) return 1;
  std::vector<double> work(run->bytes / 8 + 32);  // zero, as on the GPU
  run->work = reinterpret_cast<char*>(pc::up_to(reinterpret_cast<int64_t>(work.data()), 16));
  run->energy = energy, run->diverged = diverged;
  *diverged = 0;
  if (pc::halves(run->products)) Launches<pc::Bf16>{*run, reverse}.all();
  else Launches<float>{*run, reverse}.all();
  return 0;
}
