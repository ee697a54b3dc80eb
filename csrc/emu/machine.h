// The machine's state: one grid of fibers. Only the files of csrc/emu see it.
#pragma once

#include <bitset>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "emulation.h"
#include "fiber.h"

namespace emu {

struct Cta;
struct Cluster;
struct Copy;

// Where something happened: a wrapper's call, or the instruction of a plain access (file is null).
struct Where {
  const char* file = nullptr;
  uintptr_t at = 0;
  Where() = default;
  Where(Site site) : file(site.file), at(uintptr_t(site.line)) {}
  explicit Where(const void* instruction) : at(reinterpret_cast<uintptr_t>(instruction)) {}
};
std::string text(const Where& where);

struct Thread {
  enum State { ready, waiting, polling, done };
  Context context;
  State state = ready;
  Cta* cta = nullptr;
  unsigned index = 0;   // in the CTA
  unsigned number = 0;  // among those resident
  const char* waits_for = "";
  Site site{"", 0};
  unsigned cluster_phase = 0;
  bool cluster_arrived = false;

  uint32_t step = 1;  // race detector: the thread's own
  Knowledge known;
  Released fence_acquirable;  // what relaxed loads have read: a fence makes it known
  Knowledge fence_released;   // what a fence gives to later relaxed stores
  int fence_scope = -1;

  std::deque<std::vector<std::shared_ptr<Copy>>> groups;  // cp.async; the last one is open
  uint32_t copies = 0;

  unsigned lane() const { return index % 32; }
  unsigned warp() const { return index / 32; }
  Agent agent() const;
};

struct WarpOperation {
  int kind;
  Site site;
  uint32_t mask, arrived;
  void* arguments[32];
  Thread* threads[32];
};

struct Warp {
  std::vector<std::unique_ptr<WarpOperation>> open;
  uint32_t exists = 0, alive = 0;
};

struct Barrier {
  int expected = 0, arrived = 0;
  int sum = 0, all = 1;  // of barrier_reduce
  std::bitset<1024> who;
  std::vector<Thread*> waiting;
  std::map<unsigned, Site> warp_site;
  Knowledge arrivals;  // of those that do not wait
};

struct MbarrierState {
  unsigned number = 0, count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  std::vector<Thread*> waiting;
  Released arriving, complete;
  Agent init_agent = kNobody;
  uint32_t init_step = 0;
  bool init_fenced = false;
  Where init_where;
};

struct Cta {
  Cluster* cluster = nullptr;
  unsigned rank = 0, number = 0, slot = 0;  // slot: among those resident
  Index3 index;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  unsigned alive = 0;
  std::vector<Warp> warps;
  Barrier barriers[16];
  int reduced[2] = {0, 1};                                // of the last barrier_reduce: sum and conjunction
  std::unordered_map<uint32_t, MbarrierState> mbarriers;  // by offset
};

struct Cluster {
  unsigned number = 0;
  std::vector<Cta*> ctas;
  unsigned alive = 0, arrived = 0, phase = 0;
  std::vector<Thread*> waiting;
  Knowledge arriving, complete;
};

// An asynchronous copy in flight.
struct Copy {
  enum Kind { cp, store, bulk_shared, bulk_global } kind = cp;
  unsigned char* to = nullptr;
  const unsigned char* from = nullptr;
  unsigned bytes = 0, from_bytes = 0;
  unsigned char value[16];
  Cta* source = nullptr;
  Cta* target = nullptr;
  uint32_t mbarrier = 0;  // offset in target
  bool landed = false;
  Stamp stamp;
  uint32_t sequence = 0;  // of a cp.async in its thread
  std::vector<std::shared_ptr<struct DeferredArrival>> arrivals;
  Where where;
};

struct DeferredArrival {  // cp.async.mbarrier.arrive
  unsigned copies = 0;
  Cta* cta = nullptr;
  uint32_t mbarrier = 0;
  Stamp stamp;
  Agent copier = kNobody;
  uint32_t sequence = 0;
  Where where;
};

struct Machine {
  Options options;
  LaunchShape shape;
  Result result;
  const std::function<void()>* kernel = nullptr;
  Context scheduler;
  Thread* current = nullptr;
  bool running = false;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Thread*> ready, polling;
  std::vector<std::shared_ptr<Copy>> in_flight;
  unsigned alive = 0;
};
extern Machine machine;

struct Abort {};  // thrown by fail() in the scheduler

// scheduler.cpp
uint64_t random_bits();
bool chance(double probability);
void block(const char* waits_for, Site site);
void wake(Thread* thread);
void yield_now();
void memory_event();
std::string name(const Thread& thread);
[[noreturn]] void fail_at(const Where& where, const char* format, ...) __attribute__((format(printf, 2, 3)));

// memory.cpp
void map_shared(Cta& cta, size_t bytes);
void unmap_shared();
void check_slack();  // writes past the end of a buffer that no access check has seen
std::string describe_address(const void* p);
// Fails if [p, p + bytes) is in no place the thread may touch; the region that it lies in, or null (a stack, constants).
struct Region* check_access(const void* p, size_t bytes, const Cta* cta, bool write, const Where& where);
unsigned char* shared_pointer(uint32_t address, unsigned bytes, unsigned align, bool cluster_space, Site site);
Cta* target_of(uint32_t address, bool cluster_space, Site site);
uint32_t offset_of(uint32_t address);

// race.cpp: all of these do nothing unless options.race
enum Access { kRead = 0, kWrite = 1, kAtomic = 2, kAsyncProxy = 4 };
Stamp stamp();  // of the current thread; it goes on to its next step
void release_to(Knowledge& there, Thread& thread);
void acquire_from(const Knowledge& there, Thread& thread);
void release_to(Released& there, const Stamp& stamp, const Cta& cta, Scope scope, Memory memory = Memory::all);
void acquire_from(const Released& there, Thread& thread, Scope scope, Memory memory = Memory::all);
void barrier_order(const std::vector<Thread*>& waiting, const Knowledge& arrivals);
void record(const View& view, Agent agent, uint32_t step, const void* p, size_t bytes, int access, const Where& where);
void record(Thread& thread, const void* p, size_t bytes, int access, const Where& where);
void reset_records();
void forget_flags();

// async.cpp
void fence_inits(const Thread& thread);  // the mbarriers that the thread has initialised: for copies and other CTAs
void land(Copy& copy);
void deliver_one();

}  // namespace emu
