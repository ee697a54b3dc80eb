// Atomic words and fences. A release leaves the thread's knowledge at the word; an acquire that reads it takes it, if
// each thread lies in the other's scope. A relaxed store ends what a release has left; a read-modify-write does not.
#include <cstring>
#include <unordered_map>

#include "machine.h"

namespace emu {
namespace {

std::unordered_map<const void*, Released> words;

bool releases(Order order) { return order == Order::release || order == Order::acq_rel; }
bool acquires(Order order) { return order == Order::acquire || order == Order::acq_rel; }

void access(const uint32_t* p, int kind, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % 4) fail(site, "misaligned: atomic access at %s", describe_address(p).c_str());
  check_access(p, 4, machine.current->cta, kind & kWrite, site);
  if (chance(0.1 + machine.options.preempt)) yield_now();
  record(*machine.current, p, 4, kAtomic | kind, site);
}

void release(const uint32_t* p, Order order, Scope scope, bool keeps) {
  if (!machine.options.race) return;
  Thread& thread = *machine.current;
  Released& word = words[p];
  if (!keeps) word.clear();
  if (releases(order)) {
    release_to(word, stamp(), *thread.cta, scope);
  } else if (thread.fence_scope >= 0) {  // a fence before a relaxed store
    const Scope narrower = Scope(std::min(thread.fence_scope, int(scope)));
    Stamp fenced;
    fenced.known = thread.fence_released;
    release_to(word, fenced, *thread.cta, narrower);
  }
}

void acquire(const uint32_t* p, Order order, Scope scope) {
  if (!machine.options.race) return;
  Thread& thread = *machine.current;
  const auto word = words.find(p);
  if (word == words.end()) return;
  if (acquires(order)) {
    acquire_from(word->second, thread, scope);
  } else {  // a fence after a relaxed load makes it known
    for (const auto& [domain, known] : word->second)
      if (domain.first <= int(scope)) thread.fence_acquirable[domain].join(known);
  }
}

}  // namespace

void forget_flags() { words.clear(); }

void atomic_store(uint32_t* p, uint32_t value, Order order, Scope scope, Site site) {
  access(p, kWrite, site);
  release(p, order, scope, false);
  std::memcpy(p, &value, 4);
  memory_event();
}

uint32_t atomic_load(const uint32_t* p, Order order, Scope scope, Site site) {
  access(p, kRead, site);
  acquire(p, order, scope);
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

uint32_t atomic_add(uint32_t* p, uint32_t value, Order order, Scope scope, Site site) {
  access(p, kWrite, site);
  acquire(p, order, scope);
  release(p, order, scope, true);
  uint32_t before;
  std::memcpy(&before, p, 4);
  const uint32_t after = before + value;
  std::memcpy(p, &after, 4);
  memory_event();
  return before;
}

void fence_acq_rel(Scope scope, Site) {
  preempt_point();
  if (!machine.options.race) return;
  Thread& thread = *machine.current;
  acquire_from(thread.fence_acquirable, thread, scope);
  thread.fence_released = {};
  release_to(thread.fence_released, thread);
  thread.fence_scope = int(scope);
}

void fence_proxy_async(Site) {
  preempt_point();
  if (!machine.options.race) return;
  Thread& thread = *machine.current;
  fence_inits(thread);
  thread.known.fenced.join(thread.known.ordered);
  thread.known.fenced.set(thread.agent(), thread.step++);
}

}  // namespace emu
