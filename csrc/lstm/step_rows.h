// Which rows run at one step of LstmSteps, and what its neighbours left them: the part of a step that depends on no
// arithmetic. For the CPU and the CUDA kernels; all of it inlined, because each instruction set compiles it anew.
#pragma once

#include "../common/activations.h"
#include "lstm.h"

namespace sora {

// Step t's rows 0 .. rows - 1, of which row 0 is the data row `first`. No rows: there is no such step.
struct LstmStepPlace {
  int64_t t, first, rows;
};

struct LstmStepRows {
  LstmStepPlace now, before, after;  // before and after in the direction's own time
  int64_t sent;                      // rows of dh_next
  const int64_t* lengths;
  // Entries of `reset` between before and now, resp. now and after, of rows 0, 1, ...; or null.
  const uint8_t *clear, *cut;
  bool reverse;

  SORA_HOST_DEVICE bool within(const LstmStepPlace& place, int64_t b) const {
    return b < place.rows && (!lengths || place.t < lengths[b]);
  }
  SORA_HOST_DEVICE bool runs(int64_t b) const { return within(now, b); }
  SORA_HOST_DEVICE bool ran_before(int64_t b) const { return within(before, b); }
  // Of a row that runs: whether its state is cleared before. An entry counts where the later of its two steps runs.
  SORA_HOST_DEVICE bool clears(int64_t b) const { return clear && (!reverse || ran_before(b)) && clear[b]; }
  // Whether what the step after sent (at the last step: dh_n) is for row b.
  SORA_HOST_DEVICE bool receives(int64_t b) const {
    if (after.rows == 0) return true;
    return within(after, b) && !(cut && (!reverse || runs(b)) && cut[b]);
  }
  // Rows that the forward, the backward pass has anything to do for.
  SORA_HOST_DEVICE int64_t forward_rows() const { return now.rows; }
  SORA_HOST_DEVICE int64_t backward_rows() const { return now.rows > sent ? now.rows : sent; }
};

SORA_HOST_DEVICE LstmStepPlace lstm_step_place(const LstmSteps& steps, int64_t t) {
  if (t < 0 || t >= steps.T) return {t, 0, 0};
  if (!steps.offsets) return {t, t * steps.B, steps.B};
  return {t, steps.offsets[t], steps.offsets[t + 1] - steps.offsets[t]};
}

// On the host, where `offsets` are.
SORA_HOST_DEVICE LstmStepRows lstm_step_rows(const LstmSteps& steps, int64_t t) {
  const bool reverse = steps.direction != 0;
  const LstmStepPlace now = lstm_step_place(steps, t), earlier = lstm_step_place(steps, t - 1),
                      later = lstm_step_place(steps, t + 1);
  // The entry between steps s and s + 1 is that of s + 1.
  const uint8_t* of_now = steps.reset && now.rows ? steps.reset + now.first : nullptr;
  const uint8_t* of_later = steps.reset && later.rows ? steps.reset + later.first : nullptr;
  LstmStepRows rows{now, earlier, later, 0, steps.lengths, of_now, of_later, reverse};
  if (reverse) rows = {now, later, earlier, 0, steps.lengths, of_later, of_now, reverse};
  rows.sent = rows.after.rows ? rows.after.rows : steps.B;
  return rows;
}

// Of the step kernels' gates array and of dgates, in units of H.
constexpr int kLstmTape = 4;
SORA_HOST_DEVICE constexpr int lstm_grads(Cell cell) { return cell == Cell::gru || cell == Cell::lstm ? 4 : 1; }

}  // namespace sora
