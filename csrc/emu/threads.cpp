// Threads that wait for each other: the barriers of a CTA and of a cluster, and the lanes of a warp.
#include "threads.h"

#include <cstring>

namespace emu {

bool same_site(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

WarpOperation* join_warp(int kind, uint32_t& mask, void* argument, bool aligned, Site site) {
  Thread& thread = *machine.current;
  Warp& warp = thread.cta->warps[thread.warp()];
  mask &= warp.exists;
  if (!(mask >> thread.lane() & 1)) fail(site, "lane %u is not in its own mask %08x", thread.lane(), mask);
  if (mask & ~warp.alive) fail(site, "mask %08x names lanes that have exited (%08x are left)", mask, warp.alive);
  if (aligned && mask != kAllLanes)
    fail(site, "an instruction of a whole warp in one of %u lanes", unsigned(__builtin_popcount(mask)));
  preempt_point();
  WarpOperation* operation = nullptr;
  for (const auto& open : warp.open) {
    if (!(open->mask & mask)) continue;
    if (open->mask != mask || open->kind != kind || !same_site(open->site, site))
      fail(site, "divergent warp: %s is here with mask %08x, other lanes wait at %s with mask %08x",
           name(thread).c_str(), mask, text(open->site).c_str(), open->mask);
    operation = open.get();
  }
  if (!operation) {
    warp.open.push_back(std::make_unique<WarpOperation>());
    operation = warp.open.back().get();
    operation->kind = kind;
    operation->site = site;
    operation->mask = mask;
    operation->arrived = 0;
  }
  operation->arrived |= 1u << thread.lane();
  operation->arguments[thread.lane()] = argument;
  operation->threads[thread.lane()] = &thread;
  if (operation->arrived == mask) return operation;
  block("an instruction of the warp", site);
  return nullptr;
}

void complete_warp(WarpOperation* operation) {
  ++machine.result.collectives;
  for (int lane = 0; lane < 32; ++lane)
    if ((operation->mask >> lane & 1) && operation->threads[lane] != machine.current) wake(operation->threads[lane]);
  Warp& warp = machine.current->cta->warps[machine.current->warp()];
  for (size_t i = 0; i < warp.open.size(); ++i) {
    if (warp.open[i].get() != operation) continue;
    warp.open.erase(warp.open.begin() + long(i));
    break;
  }
}

void sync_warp(uint32_t mask, Site site) {
  WarpOperation* operation = join_warp(kSyncWarp, mask, nullptr, false, site);
  if (!operation) return;
  std::vector<Thread*> lanes;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) lanes.push_back(operation->threads[lane]);
  barrier_order(lanes, {});
  complete_warp(operation);
}

uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane, Site site) {
  struct Argument {
    uint32_t value;
    int source;
    uint32_t result;
  } argument{value, source_lane, 0};
  WarpOperation* operation = join_warp(kShuffle, mask, &argument, false, site);
  if (!operation) return argument.result;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* to = static_cast<Argument*>(operation->arguments[lane]);
    if (!(mask >> to->source & 1))
      fail(site, "lane %d reads lane %d, which is not in the mask %08x", lane, to->source, mask);
    to->result = static_cast<Argument*>(operation->arguments[to->source])->value;
  }
  complete_warp(operation);
  return argument.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  struct Argument {
    bool predicate;
    uint32_t result;
  } argument{predicate, 0};
  WarpOperation* operation = join_warp(kBallot, mask, &argument, false, site);
  if (!operation) return argument.result;
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= uint32_t(static_cast<Argument*>(operation->arguments[lane])->predicate) << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) static_cast<Argument*>(operation->arguments[lane])->result = votes;
  complete_warp(operation);
  return votes;
}

// CTA

namespace {

Barrier& arrive(int id, int threads, Site site) {
  Thread& thread = *machine.current;
  Cta& cta = *thread.cta;
  const Index3& size = machine.shape.block;
  const int all = int(size.x * size.y * size.z);
  preempt_point();
  if (id < 0 || id > 15) fail(site, "barrier %d: there are 0 to 15", id);
  if (threads < 0) {
    threads = all;
    if (int(cta.alive) != all)
      fail(site, "a block barrier after %d threads of the CTA have exited", all - int(cta.alive));
  } else if (threads % 32 || threads == 0 || threads > all) {
    fail(site, "barrier %d for %d threads: expected a multiple of 32, at most %d", id, threads, all);
  }
  Barrier& barrier = cta.barriers[id];
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads)
    fail(site, "barrier %d for %d threads, %s said %d", id, threads, text(barrier.warp_site.begin()->second).c_str(),
         barrier.expected);
  if (barrier.who[thread.index]) fail(site, "%s arrives twice at barrier %d", name(thread).c_str(), id);
  const auto [place, first] = barrier.warp_site.emplace(thread.warp(), site);
  if (!first && !same_site(place->second, site))
    fail(site, "divergent warp: %s is at barrier %d here, other lanes at %s", name(thread).c_str(), id,
         text(place->second).c_str());
  barrier.who[thread.index] = true;
  ++barrier.arrived;
  return barrier;
}

void complete(Barrier& barrier) {
  barrier_order(barrier.waiting, barrier.arrivals);
  std::vector<Thread*> waiting;
  waiting.swap(barrier.waiting);
  barrier = Barrier();
  for (Thread* thread : waiting)
    if (thread != machine.current) wake(thread);
}

}  // namespace

void barrier(int id, int threads, bool wait, Site site) {
  Barrier& barrier = arrive(id, threads, site);
  Thread& thread = *machine.current;
  if (wait)
    barrier.waiting.push_back(&thread);
  else
    release_to(barrier.arrivals, thread);
  if (barrier.arrived == barrier.expected) {
    complete(barrier);
    if (wait) yield_now();
  } else if (wait) {
    block(id == 0 ? "a block barrier" : "a named barrier", site);
  }
}

int barrier_reduce(int predicate, int operation, Site site) {
  Barrier& barrier = arrive(0, -1, site);
  Thread& thread = *machine.current;
  Cta& cta = *thread.cta;
  barrier.waiting.push_back(&thread);
  barrier.sum += predicate != 0;
  barrier.all &= predicate != 0;
  if (barrier.arrived == barrier.expected) {
    cta.reduced[0] = barrier.sum;
    cta.reduced[1] = barrier.all;
    complete(barrier);
  } else {
    block("a block barrier", site);
  }
  // Nobody reaches the next reduction before all have read this one's result: it is read before any switch.
  return operation == 2 ? cta.reduced[0] : operation == 1 ? cta.reduced[1] : int(cta.reduced[0] > 0);
}

// cluster

void cluster_arrive(bool release, Site site) {
  Thread& thread = *machine.current;
  Cluster& cluster = *thread.cta->cluster;
  preempt_point();
  if (thread.cluster_arrived)
    fail(site, "%s arrives twice at the cluster barrier without a wait", name(thread).c_str());
  thread.cluster_arrived = true;
  thread.cluster_phase = cluster.phase;
  if (release) release_to(cluster.arriving, thread);
  if (++cluster.arrived < cluster.alive) return;
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.complete = cluster.arriving;
  for (Thread* waiting : cluster.waiting) wake(waiting);
  cluster.waiting.clear();
}

void cluster_wait(Site site) {
  Thread& thread = *machine.current;
  Cluster& cluster = *thread.cta->cluster;
  if (!thread.cluster_arrived)
    fail(site, "%s waits at the cluster barrier without having arrived", name(thread).c_str());
  while (cluster.phase == thread.cluster_phase) {
    cluster.waiting.push_back(&thread);
    block("a cluster barrier", site);
  }
  thread.cluster_arrived = false;
  acquire_from(cluster.complete, thread);
  preempt_point();
}

}  // namespace emu
