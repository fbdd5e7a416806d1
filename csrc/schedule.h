// SPDX-License-Identifier: MIT
// Which nodes can move when: the light cone of the README's section 3, the C++ counterpart of pc_kernels/schedule.py. No torch here.
#pragma once

#include <cstdint>
#include <vector>

namespace pc {

// One Jacobi move. Entry l is about node l + 1.
struct Move {
  std::vector<char> moves;     // the node's phi changes
  std::vector<char> feedback;  // the product W_{l+1}^T delta_{l+1} is needed
  std::vector<char> refresh;   // phi or mu of the node changed: its delta is computed anew afterwards
  bool any = false;
};

// The sequence of moves of a chain. free[l]: some entry of the node can move; source[l]: it can have an error at t = 0.
class Cone {
 public:
  Cone(std::vector<char> free, std::vector<char> source) : free_(std::move(free)), errors_(std::move(source)) {}

  Move advance() {  // the next move; the cone widens by it
    const size_t count = free_.size();
    Move move{std::vector<char>(count), std::vector<char>(count), std::vector<char>(count), false};
    for (size_t l = 0; l < count; ++l) {
      const char above = l + 1 < count ? errors_[l + 1] : 0;
      move.moves[l] = free_[l] && (errors_[l] || above);
      move.feedback[l] = move.moves[l] && above;
      move.refresh[l] = move.moves[l] || (l > 0 && move.moves[l - 1]);
      move.any = move.any || move.moves[l];
    }
    for (size_t l = 0; l < count; ++l) errors_[l] = errors_[l] || move.refresh[l];
    return move;
  }

 private:
  std::vector<char> free_, errors_;
};

}  // namespace pc
