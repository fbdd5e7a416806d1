// SPDX-License-Identifier: MIT
// The device code of layer_errors and update_phi, run by threads of the CPU.
#include <memory>

#include "threads.h"

namespace {

template <class S>
void run(const pc::NodeTable& table, bool move) {
  host::run_block([&](const host::Teams& teams) {
    for (int64_t block = 0; block < table.first[table.count]; ++block) {
      move ? pc::move_of_block<S>(table, block, teams) : pc::errors_of_block<S>(table, block, teams);
    }
  });
}

}  // namespace

extern "C" int64_t size_of_node() { return sizeof(pc::NodeDesc); }

extern "C" void run_layer_op(const pc::NodeDesc* nodes, int64_t count, int64_t batch, float* energy, double momentum, bool move,
                             bool bf16) {
  const auto table = std::make_unique<pc::NodeTable>(pc::table_of(nodes, count, batch, energy, momentum));
  bf16 ? run<pc::Bf16>(*table, move) : run<float>(*table, move);
}
