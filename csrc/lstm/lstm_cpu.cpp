// Whole sequences on the CPU: threads, scratch memory and the order of steps. The arithmetic is in recurrence.h.
//
// One OpenMP region lasts for the whole sequence. Rows of the batch are independent of each other, and so are
// directions: while there are enough of those, each thread walks the whole sequence with its own rows and never waits.
// With fewer, threads share the units instead and meet at a barrier after each product's inputs.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../common/cpu_isa.h"
#include "lstm_kernels.h"

namespace sora {
namespace {

// A thread must get at least this much of one step to pay for a barrier (about 1 us), and at least this much of the
// sequence to pay for starting a team (some us, more when threads sleep).
constexpr int64_t kFlopsPerStepPerThread = 400'000;
constexpr int64_t kFlopsPerThread = 4'000'000;
constexpr int64_t kRowsPerThread = 4;  // fewer rows would read w_hh too often for each sum
// Rows that walk the sequence together: enough to read the weights seldom, few enough that their states stay near.
constexpr int64_t kRowsTogether = 96;

struct Plan {
  int team;
  bool share_units;
  std::vector<int64_t> borders;  // [team + 1] of the rows of all directions; by rows only
};

// Borders between `team` parts of the D * B rows, nearly equal in steps.
std::vector<int64_t> equal_steps(const LstmShape& shape, const LstmRows& rows, int team) {
  std::vector<int64_t> borders{0};
  const int64_t total = shape.D * rows.packed_rows();
  int64_t seen = 0, length = shape.T;
  for (int64_t row = 0; row < shape.D * shape.B; ++row) {
    if (row % shape.B == 0) length = shape.T;
    while (length > 0 && !rows.has(length - 1, row % shape.B)) --length;
    seen += length;
    while (static_cast<int>(borders.size()) < team && seen * team >= total * static_cast<int64_t>(borders.size()))
      borders.push_back(row + 1);
  }
  borders.resize(team, shape.D * shape.B);
  borders.push_back(shape.D * shape.B);
  return borders;
}

Plan plan_threads(const LstmShape& shape, const LstmRows& rows, int threads) {
  const int64_t O = shape.P ? shape.P : shape.H;
  const int64_t row_flops = 2 * shape.H * (lstm_gates(shape.cell) * O + shape.P);
  const int64_t flops = row_flops * shape.D * rows.packed_rows(), step_flops = flops / shape.T;
  const int64_t by_rows = shape.D * std::max<int64_t>(1, shape.B / kRowsPerThread);
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(threads, flops / kFlopsPerThread));
  const int64_t sharing = std::min(most, step_flops / kFlopsPerStepPerThread);
  const bool share_units = by_rows < most && sharing > by_rows;
  const int team = static_cast<int>(share_units ? sharing : std::min(most, by_rows));
  return {team, share_units, share_units ? std::vector<int64_t>{} : equal_steps(shape, rows, team)};
}

const LstmKernels* kernels_for(DType dtype, Cell cell) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::avx512) return lstm_kernels_avx512(dtype, cell);
  if (cpu_isa() == CpuIsa::avx2) return lstm_kernels_avx2(dtype, cell);
#endif
  return lstm_kernels_generic(dtype, cell);
}

// Vectors of units side by side in a packing whose sums are of one kind: enough of them for the cell's width, but with
// one row, whose sums are few either way, one: more blocks then, of which half are still in cache at the next step.
int vectors_for(int64_t outputs, int64_t rows, int64_t lanes) {
  if (rows == 1) return 1;
  return outputs > 2 * lanes ? 4 : outputs > lanes ? 2 : 1;
}

// A few rows wait for the weights: those of a narrow element type stay so, and are widened at every use.
constexpr int64_t kRowsOfNarrowWeights = 2;
LstmWeights kept_as(int64_t rows, const LstmKernels& kernels) {
  const bool narrow = kernels.element_bytes < kernels.state_bytes && rows <= kRowsOfNarrowWeights;
  return narrow ? LstmWeights::element : LstmWeights::state;
}

LstmPacking int8_packing(Cell cell, int64_t H, int64_t O) {
  return {O, H, lstm_gates(cell), 1, false, LstmWeights::int8};
}

// Scratch arrays in one block of memory, each aligned to 64 bytes.
class Arena {
 public:
  ~Arena() { std::free(base_); }
  // `*pointer` is set by allocate(), to null for no values.
  template <class T>
  void add(T** pointer, int64_t bytes) {
    *pointer = nullptr;
    if (bytes > 0) pieces_.push_back({reinterpret_cast<void**>(pointer), total_});
    total_ += (bytes + 63) / 64 * 64;
  }
  bool allocate() {
    if (posix_memalign(&base_, 64, std::max<int64_t>(total_, 64)) != 0) return false;
    for (const Piece& piece : pieces_) *piece.pointer = static_cast<char*>(base_) + piece.offset;
    return true;
  }

 private:
  struct Piece {
    void** pointer;
    int64_t offset;
  };
  std::vector<Piece> pieces_;
  void* base_ = nullptr;
  int64_t total_ = 0;
};

// [T] packed row of (t, 0), or none without batch_sizes.
std::vector<int64_t> packed_offsets(const LstmShape& shape) {
  std::vector<int64_t> offsets;
  int64_t sum = 0;
  for (int64_t t = 0; shape.batch_sizes && t < shape.T; sum += shape.batch_sizes[t++]) offsets.push_back(sum);
  return offsets;
}

// What forward and backward passes have in common: scratch arrays, packed weights, and the walk over parts of the work.
struct Pass {
  const LstmShape& shape;
  const LstmKernels& kernels;
  std::vector<int64_t> offsets;
  LstmScratch scratch{};
  LstmRows rows;
  Plan plan;
  Arena memory;

  Pass(const LstmShape& shape, const LstmKernels& kernels, int threads)
      : shape(shape),
        kernels(kernels),
        offsets(packed_offsets(shape)),
        rows{shape, shape.batch_sizes ? offsets.data() : nullptr},
        plan(plan_threads(shape, rows, threads)) {
    scratch.offsets = rows.offsets;
  }

  int64_t outputs() const { return shape.P ? shape.P : shape.H; }
  // Bytes of a scratch array [D, B, width].
  int64_t bytes(int64_t width) const { return shape.D * shape.B * width * kernels.state_bytes; }

  // Room for the packed weights, where the caller gave any.
  void add_weights(const void* w_hh, const void* w_hr) {
    const auto bytes = [&](const LstmPacking& p) {
      return p.values(kernels.lanes) * (p.kept_as == LstmWeights::state ? kernels.state_bytes : kernels.element_bytes);
    };
    for (int d = 0; d < shape.D; ++d) {
      memory.add(&scratch.w_hh[d], w_hh ? bytes(scratch.hh) : 0);
      memory.add(&scratch.w_hr[d], w_hr ? bytes(scratch.hr) : 0);
    }
  }

  void pack(const void* const (&w_hh)[2], const void* const (&w_hr)[2], int thread, int team) const {
    for (int d = 0; d < shape.D; ++d) {
      const auto own = [&](const LstmPacking& p) { return part_of(p.outputs, team, thread, p.grain(kernels.lanes)); };
      if (w_hh[d]) kernels.pack(w_hh[d], scratch.hh, own(scratch.hh), scratch.w_hh[d]);
      if (w_hr[d]) kernels.pack(w_hr[d], scratch.hr, own(scratch.hr), scratch.w_hr[d]);
    }
  }

  // Runs visit(outputs, hidden) on the parts that this thread owns: the same rows, units of h and hidden units. By
  // units: all rows of both directions. Else groups of rows. `grain` is that of the units of h, and without a projection
  // of the hidden units too.
  template <class Visit>
  void for_parts(int thread, int team, int64_t grain, int64_t hidden_grain, const Visit& visit) const {
    const int64_t O = outputs();
    if (plan.share_units) {
      const Range own = part_of(O, team, thread, grain);
      const Range hidden = shape.P ? part_of(shape.H, team, thread, hidden_grain) : own;
      for (int d = 0; d < shape.D; ++d) visit(LstmPart{d, {0, shape.B}, own}, LstmPart{d, {0, shape.B}, hidden});
      return;
    }
    // A team can come out smaller than planned.
    for (size_t part = thread; part + 1 < plan.borders.size(); part += team)
      for (int64_t begin = plan.borders[part], end; begin < plan.borders[part + 1]; begin = end) {
        const int d = static_cast<int>(begin / shape.B);
        end = std::min({plan.borders[part + 1], (d + 1) * shape.B, begin + kRowsTogether});
        const Range own{begin - d * shape.B, end - d * shape.B};
        visit(LstmPart{d, own, {0, O}}, LstmPart{d, own, {0, shape.H}});
      }
  }
};

}  // namespace

int lstm_forward_cpu(DType dtype, const LstmForward& a, int threads) {
  const LstmKernels* kernels = kernels_for(dtype, a.shape.cell);
  if (!kernels) return kLstmUnsupportedDType;
  const LstmShape& shape = a.shape;
  if (shape.B == 0 || shape.H == 0 || shape.T == 0) return kLstmOk;
  Pass pass(shape, *kernels, threads);
  LstmScratch& scratch = pass.scratch;
  const int64_t H = shape.H, O = pass.outputs(), lanes = kernels->lanes;
  const int gates = lstm_gates(shape.cell);
  const bool lstm = shape.cell == Cell::lstm, project = shape.P && a.w_hr[0];
  const LstmWeights kept = kept_as(shape.B, *kernels);
  scratch.hh = {O, H, gates, gates > 1 ? 1 : vectors_for(H, shape.B, lanes), false, kept};
  if (a.w_hh_int8[0]) scratch.hh = int8_packing(shape.cell, H, O);
  scratch.hr = {H, shape.P, 1, vectors_for(shape.P, shape.B, lanes), false, kept};
  pass.add_weights(a.w_hh[0], a.w_hr[0]);
  for (int d = 0; d < shape.D; ++d)
    pass.memory.add(&scratch.bias[d], a.b_ih[0] ? 4 * H * kernels->state_bytes : 0);
  pass.memory.add(&scratch.h, 2 * pass.bytes(O));
  pass.memory.add(&scratch.c, lstm ? pass.bytes(H) : 0);
  pass.memory.add(&scratch.m, shape.P ? pass.bytes(H) : 0);
  if (!pass.memory.allocate()) return kLstmOutOfMemory;
  for (int d = 0; d < shape.D; ++d)
    if (a.w_hh_int8[d]) scratch.w_hh[d] = const_cast<void*>(a.w_hh_int8[d]);

  run_team(pass.plan.team, [&](int thread, int team) {
    pass.pack(a.w_hh, a.w_hr, thread, team);
    for (int d = thread; d < shape.D; d += team)
      if (scratch.bias[d]) kernels->add_biases(a, d, scratch.bias[d]);
    const auto for_parts = [&](const auto& visit) {
      const int64_t hidden_grain = scratch.hh.grain(lanes);
      pass.for_parts(thread, team, shape.P ? scratch.hr.grain(lanes) : hidden_grain, hidden_grain, visit);
    };
    for_parts([&](const LstmPart& own, const LstmPart& hidden) { kernels->forward_begin(a, scratch, own, hidden); });
    team_barrier(team);
    if (!pass.plan.share_units) {
      for_parts([&](const LstmPart& own, const LstmPart& hidden) {
        for (int64_t s = 0; s < shape.T; ++s) {
          kernels->forward_cell(a, scratch, hidden, s);
          if (project) kernels->forward_project(a, scratch, own, s);
        }
      });
      return;
    }
    for (int64_t s = 0; s < shape.T; ++s) {
      for_parts([&](const LstmPart&, const LstmPart& hidden) { kernels->forward_cell(a, scratch, hidden, s); });
      team_barrier(team);
      if (!project) continue;
      for_parts([&](const LstmPart& own, const LstmPart&) { kernels->forward_project(a, scratch, own, s); });
      team_barrier(team);
    }
  });
  return kLstmOk;
}

int lstm_backward_cpu(DType dtype, const LstmBackward& a, int threads) {
  const LstmKernels* kernels = kernels_for(dtype, a.shape.cell);
  if (!kernels) return kLstmUnsupportedDType;
  const LstmShape& shape = a.shape;
  if (shape.B == 0 || shape.H == 0 || shape.T == 0) return kLstmOk;
  Pass pass(shape, *kernels, threads);
  LstmScratch& scratch = pass.scratch;
  const int64_t H = shape.H, O = pass.outputs(), lanes = kernels->lanes;
  const int gates = lstm_gates(shape.cell);
  const LstmWeights kept = kept_as(shape.B, *kernels);
  scratch.hh = {gates * H, O, 1, vectors_for(O, shape.B, lanes), true, kept};
  scratch.hr = {shape.P, H, 1, vectors_for(H, shape.B, lanes), true, kept};
  pass.add_weights(a.w_hh[0], a.w_hr[0]);
  pass.memory.add(&scratch.h, pass.bytes(O));
  pass.memory.add(&scratch.c, shape.cell == Cell::lstm ? pass.bytes(H) : 0);
  pass.memory.add(&scratch.m, shape.P ? pass.bytes(H) : 0);
  pass.memory.add(&scratch.dh, shape.P ? pass.bytes(O) : 0);
  pass.memory.add(&scratch.dgates, 2 * pass.bytes(gates * H));
  if (!pass.memory.allocate()) return kLstmOutOfMemory;

  run_team(pass.plan.team, [&](int thread, int team) {
    pass.pack(a.w_hh, a.w_hr, thread, team);
    const auto for_parts = [&](const auto& visit) {
      pass.for_parts(thread, team, scratch.hh.grain(lanes), scratch.hr.grain(lanes), visit);
    };
    for_parts([&](const LstmPart& own, const LstmPart& hidden) { kernels->backward_begin(a, scratch, own, hidden); });
    team_barrier(team);
    if (pass.plan.share_units) {
      for (int64_t s = 0; s < shape.T; ++s) {
        if (shape.P) {
          for_parts([&](const LstmPart& own, const LstmPart&) { kernels->backward_outputs(a, scratch, own, s); });
          team_barrier(team);
        }
        for_parts([&](const LstmPart&, const LstmPart& hidden) {
          if (shape.P) kernels->backward_project(a, scratch, hidden, s);
          kernels->backward_cell(a, scratch, hidden, s);
        });
        team_barrier(team);
        if (!a.w_hh[0]) continue;
        for_parts([&](const LstmPart& own, const LstmPart&) { kernels->backward_product(a, scratch, own, s); });
      }
    } else {
      for_parts([&](const LstmPart& own, const LstmPart& hidden) {
        for (int64_t s = 0; s < shape.T; ++s) {
          if (shape.P) {
            kernels->backward_outputs(a, scratch, own, s);
            kernels->backward_project(a, scratch, hidden, s);
          }
          kernels->backward_cell(a, scratch, hidden, s);
          if (a.w_hh[0]) kernels->backward_product(a, scratch, own, s);
        }
      });
    }
    for_parts([&](const LstmPart& own, const LstmPart& hidden) { kernels->backward_end(a, scratch, own, hidden); });
  });
  return kLstmOk;
}

void lstm_previous_states_cpu(int64_t element_bytes, const LstmShape& shape, int direction, const void* y,
                              const void* h0, void* h_prev) {
  if (shape.B == 0 || shape.H == 0) return;
  const std::vector<int64_t> offsets = packed_offsets(shape);
  const LstmRows rows{shape, shape.batch_sizes ? offsets.data() : nullptr};
  const int64_t bytes = (shape.P ? shape.P : shape.H) * element_bytes;
  for (int64_t t = 0; t < shape.T; ++t)
    for (int64_t b = 0; b < rows.active(t); ++b) {
      char* to = static_cast<char*>(h_prev) + rows.packed(t, b) * bytes;
      const int64_t before = rows.before(direction, t);
      const char* from = nullptr;
      if (rows.clears(direction, t, b)) {
      } else if (rows.has(before, b)) {
        from = static_cast<const char*>(y) + (rows.data(before, b) * shape.D + direction) * bytes;
      } else if (h0) {
        from = static_cast<const char*>(h0) + (direction * shape.B + rows.state(b)) * bytes;
      }
      if (from)
        std::memcpy(to, from, bytes);
      else
        std::memset(to, 0, bytes);
    }
}

int64_t lstm_int8_bytes_cpu(Cell cell, int64_t H, int64_t O) {
  return int8_packing(cell, H, O).values(kernels_for(DType::float32, cell)->lanes);
}

void lstm_pack_int8_cpu(Cell cell, int64_t H, int64_t O, const int8_t* w, void* packed) {
  kernels_for(DType::float32, cell)->pack(w, int8_packing(cell, H, O), {0, H}, packed);
}

const char* lstm_cpu_isa() { return kernels_for(DType::float32, Cell::lstm)->isa; }

int lstm_step_forward_cpu(DType dtype, const LstmStepForward& a, int64_t t, const void* hidden) {
  const LstmKernels* kernels = kernels_for(dtype, a.steps.cell);
  if (!kernels) return kLstmUnsupportedDType;
  kernels->step_forward(a, t, hidden);
  return kLstmOk;
}

int lstm_step_backward_cpu(DType dtype, const LstmStepBackward& a, int64_t t, const void* dh_next) {
  const LstmKernels* kernels = kernels_for(dtype, a.steps.cell);
  if (!kernels) return kLstmUnsupportedDType;
  kernels->step_backward(a, t, dh_next);
  return kLstmOk;
}

const char* lstm_error(int code) {
  switch (code) {
    case kLstmOk: return "success";
    case kLstmUnsupportedDType: return "no kernel for this element type";
    case kLstmOutOfMemory: return "out of memory";
  }
#ifdef SORA_WITH_CUDA
  return lstm_cuda_error(code);
#else
  return "unknown error";
#endif
}

}  // namespace sora
