// Vector clocks. An agent is a thread, a thread's cp.async copies, or the copies that complete on one mbarrier; each
// numbers its own steps. A clock says up to which step of each agent everything is ordered before its owner.
//
// Entries are held by CTA in blocks that clocks share until one of them changes: after a barrier all threads of the CTA
// point at the same block.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace emu {

using Agent = uint32_t;  // CTA number << 16 | index
constexpr Agent kNobody = ~0u;
inline Agent thread_agent(unsigned cta, unsigned thread) { return cta << 16 | thread; }
inline Agent copies_agent(unsigned cta, unsigned thread) { return cta << 16 | (1024 + thread); }
inline Agent mbarrier_agent(unsigned cta, unsigned number) { return cta << 16 | (2048 + number); }

class Clock {
 public:
  Clock() = default;
  Clock(const Clock& other);
  Clock(Clock&& other) noexcept : parts_(std::move(other.parts_)) { other.parts_.clear(); }
  Clock& operator=(Clock other) noexcept {
    parts_.swap(other.parts_);
    return *this;
  }
  ~Clock();

  bool covers(Agent agent, uint32_t step) const;
  void set(Agent agent, uint32_t step);
  void join(const Clock& other);
  // join(other), where `joined` has been joined already: what the two share is skipped.
  void join_next(const Clock& other, const Clock* joined);
  bool empty() const { return parts_.empty(); }

 private:
  struct Block {
    unsigned users;
    std::vector<uint32_t> steps;
  };
  struct Part {
    unsigned cta;
    Block* block;
  };
  const Block* find(unsigned cta) const;
  Block* own(unsigned cta);  // a block that this clock alone uses
  static void drop(Block* block);

  std::vector<Part> parts_;
};

// fenced: the part of `ordered` that has been through a fence.proxy.async, which bulk copies may rely on. shared: what
// holds for accesses to shared memory only.
struct Knowledge {
  Clock ordered, fenced, shared;
  void join(const Knowledge& other) {
    ordered.join(other.ordered);
    fenced.join(other.fenced);
    shared.join(other.shared);
  }
};

// Knowledge at one step of its owner: kept, and looked at.
struct Stamp {
  Knowledge known;
  Agent self = kNobody;
  uint32_t step = 0;
};
struct View {
  const Knowledge& known;
  Agent self;
  uint32_t step;
  View(const Knowledge& known, Agent self, uint32_t step) : known(known), self(self), step(step) {}
  View(const Stamp& stamp) : View(stamp.known, stamp.self, stamp.step) {}
  bool covers(Agent agent, uint32_t at) const { return agent == self ? at <= step : known.ordered.covers(agent, at); }
  bool covers_shared(Agent agent, uint32_t at) const { return covers(agent, at) || known.shared.covers(agent, at); }
  bool covers_fenced(Agent agent, uint32_t at) const { return known.fenced.covers(agent, at); }
};

// What releases have left at a flag or an mbarrier, by scope: (scope, the CTA, cluster or GPU) -> knowledge.
using Released = std::map<std::pair<int, unsigned>, Knowledge>;

}  // namespace emu
