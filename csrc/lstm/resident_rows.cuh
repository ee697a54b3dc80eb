// Which rows a thread owns, how many steps they have, and where a step's data lies.
#pragma once

#include "../common/launch.cuh"
#include "../common/memory.cuh"
#include "lstm_resident.h"
#include "resident_tile.cuh"

namespace sora {
namespace resident {

constexpr int kStepsToL2 = 4;  // between the request for a step's data to L2 and its load

// Two rows of the batch. Steps are counted as the direction takes them: the reverse direction's step 0 is a row's last.
// Without kRagged all rows have T steps, there is no reset, and rows past the batch run along with the last one's data.
template <bool kRagged>
struct Rows {
  int batch[2];   // row of the batch, one that exists
  bool there[2];  // false: nothing of this row is written
  int length[2];  // 0 for a row that is not there; T without kRagged
  int steps;      // of the CTA's longest row
  int B;
  int stride;  // from a step's data row to the next step's, without kRagged
  bool reverse;
  const int64_t* offsets;  // [T] or null
  const uint8_t* reset;    // [data rows] or null

  SORA_DEVICE Rows(const LstmResidentShape& shape, int first, int own, bool reverse_)
      : steps(int(shape.T)), B(int(shape.B)), reverse(reverse_), offsets(shape.offsets), reset(shape.reset) {
    stride = reverse ? -B : B;
    if (!kRagged) keep(stride);
    SORA_UNROLL
    for (int i = 0; i < 2; ++i) {
      there[i] = first + own + i < B;
      batch[i] = there[i] ? first + own + i : B - 1;
      length[i] = !kRagged || there[i] ? steps : 0;
    }
    if constexpr (kRagged) {
      if (!shape.lengths) return;
      SORA_UNROLL
      for (int i = 0; i < 2; ++i)
        if (there[i]) length[i] = cut(shape.lengths[batch[i]], int(shape.T));
      steps = 0;
      SORA_UNROLL
      for (int row = first; row < first + kRows; ++row) {
        if (row >= B) continue;
        const int other = cut(shape.lengths[row], int(shape.T));
        steps = other > steps ? other : steps;
      }
    }
  }
  static SORA_DEVICE int cut(int length, int T) { return length < 0 ? 0 : length < T ? length : T; }

  // Whether row i has a step s.
  SORA_DEVICE bool runs(int i, int s) const { return kRagged ? unsigned(s) < unsigned(length[i]) : there[i]; }

  // Data row of row i's step s, which it must have.
  SORA_DEVICE int data_row(int i, int s) const {
    const int t = reverse ? length[i] - 1 - s : s;
    if (kRagged && offsets) return int(offsets[t]) + batch[i];
    return t * B + batch[i];
  }
  // The next in the direction of `by` = 1 or -1 steps, from data row `row` of row i's step s - by; `row` itself if
  // there is no step s.
  SORA_DEVICE int moved(int i, int row, int s, int by) const {
    if (kRagged) return runs(i, s) ? data_row(i, s) : row;
    return row + by * stride;
  }
  // Whether row i's state is cleared between two of its steps, from the data rows of both.
  SORA_DEVICE bool cleared(int earlier, int later) const {
    return reset[reverse ? earlier : later] != 0;
  }
};

}  // namespace resident
}  // namespace sora
