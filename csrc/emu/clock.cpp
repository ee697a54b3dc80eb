#include "clock.h"

#include <algorithm>

namespace emu {

Clock::Clock(const Clock& other) : parts_(other.parts_) {
  for (Part& part : parts_) ++part.block->users;
}

Clock::~Clock() {
  for (Part& part : parts_) drop(part.block);
}

void Clock::drop(Block* block) {
  if (--block->users == 0) delete block;
}

const Clock::Block* Clock::find(unsigned cta) const {
  for (const Part& part : parts_)
    if (part.cta == cta) return part.block;
  return nullptr;
}

Clock::Block* Clock::own(unsigned cta) {
  for (Part& part : parts_) {
    if (part.cta != cta) continue;
    if (part.block->users > 1) {
      auto* copy = new Block{1, part.block->steps};
      --part.block->users;
      part.block = copy;
    }
    return part.block;
  }
  parts_.push_back({cta, new Block{1, {}}});
  return parts_.back().block;
}

bool Clock::covers(Agent agent, uint32_t step) const {
  const Block* block = find(agent >> 16);
  const unsigned index = agent & 0xffff;
  return block && index < block->steps.size() && block->steps[index] >= step;
}

void Clock::set(Agent agent, uint32_t step) {
  if (covers(agent, step)) return;
  std::vector<uint32_t>& steps = own(agent >> 16)->steps;
  const unsigned index = agent & 0xffff;
  if (steps.size() <= index) steps.resize(index + 1);
  steps[index] = step;
}

void Clock::join(const Clock& other) { join_next(other, nullptr); }

void Clock::join_next(const Clock& other, const Clock* joined) {
  for (const Part& part : other.parts_) {
    const Block* mine = find(part.cta);
    if (mine == part.block || (joined && joined->find(part.cta) == part.block)) continue;
    if (!mine) {
      parts_.push_back(part);
      ++part.block->users;
      continue;
    }
    const std::vector<uint32_t>&a = mine->steps, &b = part.block->steps;
    const size_t both = std::min(a.size(), b.size());
    bool a_later = a.size() > b.size(), b_later = b.size() > a.size();
    for (size_t i = 0; i < both; ++i) {
      a_later |= a[i] > b[i];
      b_later |= b[i] > a[i];
    }
    if (!b_later) continue;
    if (!a_later) {
      for (Part& own : parts_) {
        if (own.cta != part.cta) continue;
        ++part.block->users;
        drop(own.block);
        own.block = part.block;
      }
      continue;
    }
    std::vector<uint32_t>& steps = own(part.cta)->steps;
    if (steps.size() < b.size()) steps.resize(b.size());
    for (size_t i = 0; i < b.size(); ++i) steps[i] = std::max(steps[i], b[i]);
  }
}

}  // namespace emu
