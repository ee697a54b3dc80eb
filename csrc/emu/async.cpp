// Asynchronous copies and mbarriers. A copy is queued when it is issued and lands later: at once, at a random moment,
// or when nothing else can happen. It reads its source when it lands. What it reads and writes is recorded under an
// agent of its own, which only the wait for it orders: the thread's cp.async, or the mbarrier that it completes on.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emu {
namespace {

constexpr uint64_t kMagic = 0x5041424d00000000ull;  // in the place of an mbarrier
constexpr int64_t kMaxBytes = (1 << 20) - 1;
constexpr unsigned kPieces = 4;  // a bulk copy lands in up to so many, in any order

Stamp own_stamp() {
  Stamp now = stamp();
  if (!machine.options.race) now.self = kNobody;
  return now;
}

// remote: by a copy or from another CTA.
MbarrierState& mbarrier_in(Cta& cta, uint32_t offset, const View& user, bool remote, const char* what,
                           const Where& where) {
  const auto found = cta.mbarriers.find(offset);
  if (found == cta.mbarriers.end())
    fail_at(where, "%s at shared memory of CTA %u + %u: no mbarrier was initialised there", what, cta.number, offset);
  uint64_t there;
  std::memcpy(&there, cta.shared + offset, 8);
  if (there != kMagic + offset)
    fail_at(where, "%s: the mbarrier at shared memory of CTA %u + %u was overwritten", what, cta.number, offset);
  MbarrierState& state = found->second;
  if (machine.options.race && !user.covers_shared(state.init_agent, state.init_step))
    fail_at(where, "race: %s on the mbarrier at shared memory of CTA %u + %u, unordered with its initialisation at %s",
            what, cta.number, offset, text(state.init_where).c_str());
  if (machine.options.race && remote && !state.init_fenced)
    fail_at(where,
            "race: %s on the mbarrier at shared memory of CTA %u + %u, no fence_mbarrier_init since its initialisation "
            "at %s",
            what, cta.number, offset, text(state.init_where).c_str());
  return state;
}

MbarrierState& mbarrier_at(uint32_t address, bool remote, const char* what, Site site) {
  shared_pointer(address, 8, 8, remote, site);
  const Thread& thread = *machine.current;
  const View user(thread.known, thread.agent(), thread.step);
  Cta* target = target_of(address, remote, site);
  return mbarrier_in(*target, offset_of(address), user, target != thread.cta, what, site);
}

void complete_if_due(Cta& cta, MbarrierState& state, const Where& where) {
  if (state.bytes > kMaxBytes || state.bytes < -kMaxBytes) fail_at(where, "mbarrier: the byte count is out of range");
  if (state.pending > 0 || state.bytes != 0) return;
  ++state.phase;
  state.pending = state.count;
  if (machine.options.race) {
    const Agent copies = mbarrier_agent(cta.number, state.number);
    for (auto& [domain, known] : state.arriving) known.ordered.set(copies, state.phase);
    state.complete = state.arriving;
  }
  for (Thread* waiting : state.waiting) wake(waiting);
  state.waiting.clear();
}

void arrive(Cta& cta, MbarrierState& state, const Where& where) {
  if (state.pending == 0) fail_at(where, "mbarrier: more arrivals than the %u of this phase", state.count);
  --state.pending;
  complete_if_due(cta, state, where);
}

void issue(const std::shared_ptr<Copy>& copy) {
  if (machine.options.delivery == Delivery::immediate)
    land(*copy);
  else
    machine.in_flight.push_back(copy);
}

void land_cp(Copy& copy) {
  const Agent agent = copies_agent(copy.source->number, copy.stamp.self & 0xffff);
  record(copy.stamp, agent, copy.sequence, copy.from, copy.from_bytes, kRead, copy.where);
  record(copy.stamp, agent, copy.sequence, copy.to, copy.bytes, kWrite, copy.where);
  std::memcpy(copy.to, copy.from, copy.from_bytes);
  std::memset(copy.to + copy.from_bytes, 0, copy.bytes - copy.from_bytes);
  for (const auto& arrival : copy.arrivals) {
    if (--arrival->copies > 0) continue;
    MbarrierState& state =
        mbarrier_in(*arrival->cta, arrival->mbarrier, arrival->stamp, false, "arrival of cp.async", arrival->where);
    release_to(state.arriving, arrival->stamp, *arrival->cta, Scope::cta);
    if (machine.options.race)
      for (auto& [domain, known] : state.arriving) known.ordered.set(arrival->copier, arrival->sequence);
    arrive(*arrival->cta, state, arrival->where);
  }
}

void land_by_mbarrier(Copy& copy) {
  if (copy.target->alive == 0) fail_at(copy.where, "a copy lands in CTA rank %u, which has exited", copy.target->rank);
  if (copy.kind == Copy::bulk_shared && copy.source->alive == 0)
    fail_at(copy.where, "a bulk copy reads the shared memory of CTA rank %u, which has exited", copy.source->rank);
  MbarrierState& state = mbarrier_in(*copy.target, copy.mbarrier, copy.stamp, true, "complete_tx", copy.where);
  const Agent agent = mbarrier_agent(copy.target->number, state.number);
  const uint32_t step = state.phase + 1;  // known to those who see this phase complete
  const int proxy = copy.kind == Copy::store ? 0 : kAsyncProxy;
  if (copy.kind != Copy::store) record(copy.stamp, agent, step, copy.from, copy.bytes, kRead | proxy, copy.where);
  record(copy.stamp, agent, step, copy.to, copy.bytes, kWrite | proxy, copy.where);
  std::memcpy(copy.to, copy.kind == Copy::store ? copy.value : copy.from, copy.bytes);
  release_to(state.arriving, copy.stamp, *copy.target, Scope::cluster);
  state.bytes -= copy.bytes;
  complete_if_due(*copy.target, state, copy.where);
}

std::shared_ptr<Copy> new_copy(Copy::Kind kind, unsigned char* to, const void* from, unsigned bytes, Site site) {
  auto copy = std::make_shared<Copy>();
  copy->kind = kind;
  copy->to = to;
  copy->from = static_cast<const unsigned char*>(from);
  copy->bytes = copy->from_bytes = bytes;
  copy->source = machine.current->cta;
  copy->stamp = own_stamp();
  copy->where = site;
  return copy;
}

void issue_bulk(Copy::Kind kind, Cta* target, unsigned char* to, const unsigned char* from, unsigned bytes,
                uint32_t mbarrier, Site site) {
  const unsigned piece = (bytes / kPieces + 15) / 16 * 16;
  for (unsigned done = 0; done < bytes; done += piece) {
    const auto copy = new_copy(kind, to + done, from + done, std::min(piece, bytes - done), site);
    copy->target = target;
    copy->mbarrier = mbarrier;
    issue(copy);
  }
}

void check_bulk(uint32_t to, unsigned bytes, uint32_t mbarrier, Site site) {
  if (bytes == 0 || bytes % 16) fail(site, "a bulk copy of %u bytes: expected a multiple of 16", bytes);
  shared_pointer(mbarrier, 8, 8, true, site);
  if (target_of(mbarrier, true, site) != target_of(to, true, site))
    fail(site, "the data and the mbarrier of the copy lie in different CTAs");
}

}  // namespace

void land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  ++machine.result.copies;
  if (copy.kind == Copy::cp)
    land_cp(copy);
  else
    land_by_mbarrier(copy);
}

void deliver_one() {
  const size_t i = random_bits() % machine.in_flight.size();
  const std::shared_ptr<Copy> copy = machine.in_flight[i];
  machine.in_flight[i] = machine.in_flight.back();
  machine.in_flight.pop_back();
  land(*copy);
}

// cp.async

void cp_async(uint32_t to, const void* from, unsigned bytes, unsigned from_bytes, Site site) {
  preempt_point();
  Thread& thread = *machine.current;
  unsigned char* there = shared_pointer(to, bytes, bytes, false, site);
  if (from_bytes > bytes) fail(site, "cp.async reads %u bytes to write %u", from_bytes, bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail(site, "misaligned: cp.async of %u bytes from %p", bytes, from);
  if (from_bytes > 0) check_access(from, from_bytes, thread.cta, false, site);
  const auto copy = new_copy(Copy::cp, there, from, bytes, site);
  copy->from_bytes = from_bytes;
  copy->sequence = ++thread.copies;
  if (thread.groups.empty()) thread.groups.emplace_back();
  thread.groups.back().push_back(copy);
  issue(copy);
}

void cp_async_commit(Site) {
  std::deque<std::vector<std::shared_ptr<Copy>>>& groups = machine.current->groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void cp_async_wait(int pending, Site) {
  preempt_point();
  Thread& thread = *machine.current;
  const Agent copies = copies_agent(thread.cta->number, thread.index);
  while (int(thread.groups.size()) - 1 > pending) {
    for (const auto& copy : thread.groups.front()) {
      if (!copy->landed) {
        machine.in_flight.erase(std::find(machine.in_flight.begin(), machine.in_flight.end(), copy));
        land(*copy);
      }
      if (machine.options.race) thread.known.ordered.set(copies, copy->sequence);
    }
    thread.groups.pop_front();
  }
}

void cp_async_mbarrier_arrive(uint32_t mbarrier, Site site) {
  preempt_point();
  MbarrierState& state = mbarrier_at(mbarrier, false, "arrival of cp.async", site);
  Thread& thread = *machine.current;
  auto arrival = std::make_shared<DeferredArrival>();
  arrival->cta = thread.cta;
  arrival->mbarrier = offset_of(mbarrier);
  arrival->stamp = own_stamp();
  arrival->copier = copies_agent(thread.cta->number, thread.index);
  arrival->sequence = thread.copies;
  arrival->where = site;
  for (const auto& group : thread.groups) {
    for (const auto& copy : group) {
      if (copy->landed) continue;
      ++arrival->copies;
      copy->arrivals.push_back(arrival);
    }
  }
  if (arrival->copies > 0) return;
  release_to(state.arriving, arrival->stamp, *thread.cta, Scope::cta);
  if (machine.options.race)
    for (auto& [domain, known] : state.arriving) known.ordered.set(arrival->copier, arrival->sequence);
  arrive(*thread.cta, state, site);
}

// copies that complete on an mbarrier

void st_async(uint32_t to, const void* value, unsigned bytes, uint32_t mbarrier, Site site) {
  preempt_point();
  unsigned char* there = shared_pointer(to, bytes, bytes, true, site);
  shared_pointer(mbarrier, 8, 8, true, site);
  Cta* target = target_of(to, true, site);
  if (target_of(mbarrier, true, site) != target)
    fail(site, "the data and the mbarrier of the copy lie in different CTAs");
  const auto copy = new_copy(Copy::store, there, nullptr, bytes, site);
  std::memcpy(copy->value, value, bytes);
  copy->target = target;
  copy->mbarrier = offset_of(mbarrier);
  issue(copy);
}

void bulk_shared_to_cluster(uint32_t to, uint32_t from, unsigned bytes, uint32_t mbarrier, Site site) {
  preempt_point();
  check_bulk(to, bytes, mbarrier, site);
  unsigned char* there = shared_pointer(to, bytes, 16, true, site);
  const unsigned char* here = shared_pointer(from, bytes, 16, false, site);
  issue_bulk(Copy::bulk_shared, target_of(to, true, site), there, here, bytes, offset_of(mbarrier), site);
}

void bulk_global_to_shared(uint32_t to, const void* from, unsigned bytes, uint32_t mbarrier, unsigned ranks,
                           Site site) {
  preempt_point();
  if (reinterpret_cast<uintptr_t>(from) % 16) fail(site, "misaligned: bulk copy from %p", from);
  check_access(from, bytes, machine.current->cta, false, site);
  const auto* here = static_cast<const unsigned char*>(from);
  if (ranks == 0) {
    check_bulk(to, bytes, mbarrier, site);
    issue_bulk(Copy::bulk_global, target_of(to, true, site), shared_pointer(to, bytes, 16, true, site), here, bytes,
               offset_of(mbarrier), site);
    return;
  }
  for (unsigned rank = 0; rank < 16; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    const uint32_t there = map_to_rank(to, rank, site), signal = map_to_rank(mbarrier, rank, site);
    check_bulk(there, bytes, signal, site);
    issue_bulk(Copy::bulk_global, target_of(there, true, site), shared_pointer(there, bytes, 16, true, site), here,
               bytes, offset_of(signal), site);
  }
}

// mbarriers

void mbarrier_init(uint32_t mbarrier, unsigned count, Site site) {
  preempt_point();
  unsigned char* there = shared_pointer(mbarrier, 8, 8, false, site);
  if (count == 0 || count > kMaxBytes) fail(site, "mbarrier_init with a count of %u", count);
  Thread& thread = *machine.current;
  Cta& cta = *thread.cta;
  record(thread, there, 8, kWrite, site);
  const uint32_t offset = offset_of(mbarrier);
  const uint64_t magic = kMagic + offset;
  std::memcpy(there, &magic, 8);
  MbarrierState state;
  const auto before = cta.mbarriers.find(offset);
  state.number = before == cta.mbarriers.end() ? unsigned(cta.mbarriers.size()) : before->second.number;
  state.count = state.pending = count;
  state.init_agent = thread.agent();
  state.init_step = thread.step;
  state.init_where = site;
  cta.mbarriers[offset] = state;
}

void fence_inits(const Thread& thread) {
  if (!machine.options.race) return;
  for (auto& [offset, state] : thread.cta->mbarriers)
    if (state.init_agent == thread.agent()) state.init_fenced = true;
}

void fence_mbarrier_init(Site) {
  preempt_point();
  fence_inits(*machine.current);
}

void mbarrier_expect_tx(uint32_t mbarrier, unsigned bytes, Site site) {
  preempt_point();
  MbarrierState& state = mbarrier_at(mbarrier, false, "expect_tx", site);
  state.bytes += bytes;
  complete_if_due(*machine.current->cta, state, site);
}

void mbarrier_arrive(uint32_t mbarrier, unsigned expect_bytes, bool remote, Order order, Scope scope, Memory memory,
                     Site site) {
  preempt_point();
  MbarrierState& state = mbarrier_at(mbarrier, remote, "arrival", site);
  if (order == Order::release) release_to(state.arriving, stamp(), *machine.current->cta, scope, memory);
  state.bytes += expect_bytes;
  arrive(*target_of(mbarrier, remote, site), state, site);
}

bool mbarrier_try_wait(uint32_t mbarrier, unsigned parity, Scope scope, Memory memory, Site site) {
  preempt_point();
  for (int attempt = 0;; ++attempt) {
    MbarrierState& state = mbarrier_at(mbarrier, false, "wait", site);
    if ((state.phase & 1) != (parity & 1)) {
      acquire_from(state.complete, *machine.current, scope, memory);
      return true;
    }
    if (attempt > 0) return false;  // a waiter two phases behind goes on waiting, as on the GPU
    state.waiting.push_back(machine.current);
    block("a wait for an mbarrier", site);
  }
}

void mbarrier_wait(uint32_t mbarrier, unsigned parity, Scope scope, Memory memory, Site site) {
  while (!mbarrier_try_wait(mbarrier, parity, scope, memory, site)) {
  }
}

}  // namespace emu
