// The race detector: two accesses to the same bytes, one of them a write, must be ordered by happens-before. Barriers,
// releases and acquires carry knowledge; shuffles, votes, ldmatrix and mma carry none.
#include "machine.h"
#include "region.h"

namespace emu {
namespace {

std::string who(Agent agent) {
  const unsigned cta = agent >> 16, index = agent & 0xffff,
                 size = machine.shape.block.x * machine.shape.block.y * machine.shape.block.z;
  const std::string of = " of CTA " + std::to_string(cta);
  if (index < size) return "thread " + std::to_string(index) + of;
  if (index >= 2048) return "a copy that completes on an mbarrier" + of;
  return "a cp.async of thread " + std::to_string(index - 1024) + of;
}

const char* verb(int access) {
  if (access & kAtomic) return access & kWrite ? "atomic write" : "atomic read";
  return access & kWrite ? "write" : "read";
}

void report(const Record& now, const Record& before, const Region& region, const unsigned char* p, const char* why) {
  fail_at(now.where, "race: %s of %s by %s, %s the %s by %s at %s", verb(now.access), place_text(region, p).c_str(),
          who(now.agent).c_str(), why, verb(before.access), who(before.agent).c_str(), text(before.where).c_str());
}

void visit(Cell& cell, const View& view, const Record& now, const Region& region, const unsigned char* p) {
  const bool write = now.access & kWrite;
  size_t kept = 0;
  for (size_t i = 0; i < cell.size(); ++i) {
    const Record& before = cell[i];
    bool keep = true;
    if (before.bytes & now.bytes) {
      const bool both_atomic = before.access & now.access & kAtomic;
      const bool ordered =
          region.cta ? view.covers_shared(before.agent, before.step) : view.covers(before.agent, before.step);
      if ((write || (before.access & kWrite)) && !both_atomic) {
        if (!ordered) report(now, before, region, p, "unordered with");
        const bool crosses = (now.access & kAsyncProxy) && !(before.access & kAsyncProxy);
        if (crosses && (before.access & kWrite) && !view.covers_fenced(before.agent, before.step))
          report(now, before, region, p, "no fence.proxy.async since");
      }
      // What the new access is ordered after, a later one ordered after the new one is too.
      const bool covered = !(before.bytes & ~now.bytes);
      keep = !(covered && ordered && (write || !(before.access & kWrite)));
    }
    if (keep) {
      if (kept != i) cell[kept] = before;
      ++kept;
    }
  }
  cell.resize(kept);
  cell.push_back(now);
}

}  // namespace

Agent Thread::agent() const { return thread_agent(cta->number, index); }

Stamp stamp() {
  Thread& thread = *machine.current;
  if (!machine.options.race) return {};
  return {thread.known, thread.agent(), thread.step++};
}

void release_to(Knowledge& there, Thread& thread) {
  if (!machine.options.race) return;
  there.join(thread.known);
  there.ordered.set(thread.agent(), thread.step++);
}

void acquire_from(const Knowledge& there, Thread& thread) {
  if (machine.options.race) thread.known.join(there);
}

namespace {

unsigned domain(const Cta& cta, Scope scope) {
  return scope == Scope::cta ? cta.number : scope == Scope::cluster ? cta.cluster->number : 0;
}

}  // namespace

void release_to(Released& there, const Stamp& stamp, const Cta& cta, Scope scope, Memory memory) {
  if (!machine.options.race) return;
  for (int s = 0; s <= int(scope); ++s) {
    Knowledge& known = there[{s, domain(cta, Scope(s))}];
    Clock& now = memory == Memory::all ? known.ordered : known.shared;
    now.join(stamp.known.ordered);
    known.fenced.join(stamp.known.fenced);
    known.shared.join(stamp.known.shared);
    if (stamp.self != kNobody) now.set(stamp.self, stamp.step);
  }
}

void acquire_from(const Released& there, Thread& thread, Scope scope, Memory memory) {
  if (!machine.options.race) return;
  for (int s = 0; s <= int(scope); ++s) {
    const auto found = there.find({s, domain(*thread.cta, Scope(s))});
    if (found == there.end()) continue;
    const Knowledge& known = found->second;
    (memory == Memory::all ? thread.known.ordered : thread.known.shared).join(known.ordered);
    thread.known.fenced.join(known.fenced);
    thread.known.shared.join(known.shared);
  }
}

void barrier_order(const std::vector<Thread*>& waiting, const Knowledge& arrivals) {
  if (!machine.options.race) return;
  Knowledge all = arrivals;
  const Thread* previous = nullptr;
  for (const Thread* thread : waiting) {
    all.ordered.join_next(thread->known.ordered, previous ? &previous->known.ordered : nullptr);
    all.fenced.join_next(thread->known.fenced, previous ? &previous->known.fenced : nullptr);
    all.shared.join_next(thread->known.shared, previous ? &previous->known.shared : nullptr);
    previous = thread;
  }
  for (Thread* thread : waiting) all.ordered.set(thread->agent(), thread->step++);
  for (Thread* thread : waiting) thread->known = all;
}

void record(const View& view, Agent agent, uint32_t step, const void* p, size_t bytes, int access, const Where& where) {
  if (!machine.options.race || bytes == 0) return;
  Region* region = find_region(p);
  if (!region) return;
  if (region->cells.empty()) region->cells.resize((region->bytes + 3) / 4);
  ++machine.result.accesses;
  const size_t first = size_t(static_cast<const unsigned char*>(p) - region->begin), end = first + bytes;
  Record now{agent, step, where, 0, uint8_t(access)};
  for (size_t cell = first / 4; cell * 4 < end; ++cell) {
    const size_t from = std::max(first, cell * 4) - cell * 4, to = std::min(end, cell * 4 + 4) - cell * 4;
    now.bytes = uint8_t((1u << to) - (1u << from));
    visit(region->cells[cell], view, now, *region, region->begin + cell * 4 + from);
  }
}

void record(Thread& thread, const void* p, size_t bytes, int access, const Where& where) {
  if (!machine.options.race) return;
  const Agent agent = thread.agent();
  const View view{thread.known, agent, thread.step};
  record(view, agent, thread.step, p, bytes, access, where);
}

void reset_records() {
  for (const auto& region : all_regions()) {
    if (region->cells.empty()) continue;
    region->cells.clear();
    region->cells.shrink_to_fit();
  }
}

}  // namespace emu

// what the compiler calls under -fsanitize=thread

namespace {

inline void plain_access(const void* p, size_t bytes, int access, const void* instruction) {
  emu::Thread* thread = emu::machine.current;
  if (!thread) return;  // the test's own code
  const emu::Where where(instruction);
  if (!emu::check_access(p, bytes, thread->cta, access & emu::kWrite, where)) return;
  if (emu::chance(emu::machine.options.preempt_access)) emu::yield_now();
  emu::record(*thread, p, bytes, access, where);
}

}  // namespace

#define SORA_EMU_HOOKS(N)                                                                                 \
  void __tsan_read##N(void* p) { plain_access(p, N, emu::kRead, __builtin_return_address(0)); }           \
  void __tsan_write##N(void* p) { plain_access(p, N, emu::kWrite, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##N(void* p) { plain_access(p, N, emu::kRead, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##N(void* p) { plain_access(p, N, emu::kWrite, __builtin_return_address(0)); }
extern "C" {
SORA_EMU_HOOKS(1)
SORA_EMU_HOOKS(2)
SORA_EMU_HOOKS(4)
SORA_EMU_HOOKS(8)
SORA_EMU_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { plain_access(p, bytes, emu::kRead, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { plain_access(p, bytes, emu::kWrite, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
