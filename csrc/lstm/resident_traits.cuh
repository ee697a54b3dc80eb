// What tells the cells apart. Cell::rnn_tanh stands for both kinds of RNN: which it is, is told at run time.
#pragma once

#include "lstm.h"

namespace sora {
namespace resident {

template <Cell kCell>
constexpr int kGatesOf = kCell == Cell::lstm ? 4 : kCell == Cell::gru ? 3 : 1;  // in w_hh
template <Cell kCell>
constexpr int kTapeOf = kCell == Cell::lstm || kCell == Cell::gru ? 4 : 0;  // columns of the tape, in units of H

}  // namespace resident
}  // namespace sora
