// What the wrappers of csrc/common/*.cuh call under SORA_HOST_EMULATION, and what tests call to launch. See README.md.
//
// The files of csrc/emu are compiled without sanitizers. A kernel's file may be compiled with -fsanitize=thread: the
// compiler then calls __tsan_read4 and its kin at every access, which race.cpp implements (libtsan is not linked).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emu {

// Where in the kernel a wrapper was called. As a default argument it names the caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

// Numbered as PTX orders them: a wider scope includes a narrower one.
enum class Scope : int { cta = 0, cluster = 1, gpu = 2 };
enum class Order : int { relaxed = 0, acquire = 1, release = 2, acq_rel = 3 };
// What a release or an acquire of an mbarrier is about.
enum class Memory : int { all = 0, shared = 1 };

// starve: one thread, warp or CTA does not run while anything else can, for the whole launch or in turns.
enum class Policy : int { fifo = 0, uniform = 1, starve = 2 };
// When asynchronous copies land: at once, at a random moment, or only when nothing else can happen.
enum class Delivery : int { immediate = 0, random = 1, last_moment = 2 };

struct Options {
  uint64_t seed = 0;
  Policy policy = Policy::uniform;
  Delivery delivery = Delivery::random;
  bool race = false;                 // happens-before checks; plain accesses are seen only in an instrumented build
  double preempt = 0.02;             // chance to switch threads at a wrapper that does not block
  double preempt_access = 0.001;     // the same at a plain access of an instrumented build
  double deliver = 0.05;             // Delivery::random: chance per scheduling step that one copy lands
  unsigned resident_threads = 4096;  // CTAs run together up to this many; a cooperative launch needs all of them
  uint64_t max_switches = 200'000'000;

  // Policy, delivery and its chance, drawn from the seed: a run of consecutive seeds meets all of them.
  static Options from_seed(uint64_t seed, bool race);
};

struct Result {
  bool ok = true;
  std::string report;  // the first error: a race, a deadlock, the misuse of an instruction
  uint64_t switches = 0, collectives = 0, copies = 0, accesses = 0;
};

struct LaunchShape {
  Index3 grid, block;
  unsigned cluster = 1;  // CTAs, along x
  size_t shared_bytes = 0;
  bool cooperative = false;
};

constexpr size_t kMaxSharedBytes = 227 * 1024;

// Options of the launches to come, and the result of the last one.
void configure(const Options& options);
const Options& options();
Result launch(const LaunchShape& shape, const std::function<void()>& thread);
const Result& last_result();

// Global memory between guard pages, filled with NaN; followed by the race detector and the bounds check.
void* allocate(size_t bytes, const char* name);
void release(void* memory);

// A test of the mutation machinery switches one synchronisation of the kernel off; -1: none.
extern int mutation;

// for the wrappers: the calling thread
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
Index3 thread_index();
Index3 block_index();
Index3 block_size();
Index3 grid_size();
unsigned lane();
unsigned warp();
unsigned cluster_rank();
unsigned cluster_size();
void preempt_point();
// One access of 2 to 16 bytes, aligned to its size, to global or this CTA's shared memory.
void load(void* to, const void* p, unsigned bytes, Site site);
void store(void* p, const void* from, unsigned bytes, Site site);

// Shared memory. A 32-bit address is an offset in the window of one CTA of the cluster.
void* shared_memory(size_t bytes, Site site);
uint32_t shared_address(const void* p, Site site);
uint32_t map_to_rank(uint32_t address, unsigned rank, Site site);
void store_cluster(uint32_t address, const void* value, unsigned bytes, Site site);
void load_cluster(void* value, uint32_t address, unsigned bytes, Site site);

// Threads that wait for each other. threads < 0: all of the CTA.
void barrier(int id, int threads, bool wait, Site site);
int barrier_reduce(int predicate, int operation, Site site);  // operation: 0 or, 1 and, 2 sum
void sync_warp(uint32_t mask, Site site);
uint32_t shuffle(uint32_t mask, uint32_t value, int source_lane, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);
void cluster_arrive(bool release, Site site);
void cluster_wait(Site site);

// Matrix fragments: the lanes of a warp together.
void ldmatrix(uint32_t* fragments, int count, uint32_t row_address, bool transposed, Site site);
enum class Operand { f16, bf16, tf32 };
// d += a b for 16 rows of a, 8 columns of b; k = 16 (f16, bf16) or 8 (tf32).
void mma(Operand type, float* d, const uint32_t* a, const uint32_t* b, Site site);

// Asynchronous copies.
void cp_async(uint32_t to, const void* from, unsigned bytes, unsigned from_bytes, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int pending, Site site);
void st_async(uint32_t to, const void* value, unsigned bytes, uint32_t mbarrier, Site site);
void bulk_shared_to_cluster(uint32_t to, uint32_t from, unsigned bytes, uint32_t mbarrier, Site site);
// ranks: a bit per CTA of the cluster that receives; 0: the address as it stands.
void bulk_global_to_shared(uint32_t to, const void* from, unsigned bytes, uint32_t mbarrier, unsigned ranks, Site site);

void mbarrier_init(uint32_t mbarrier, unsigned count, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_expect_tx(uint32_t mbarrier, unsigned bytes, Site site);
void mbarrier_arrive(uint32_t mbarrier, unsigned expect_bytes, bool remote, Order order, Scope scope, Memory memory,
                     Site site);
void cp_async_mbarrier_arrive(uint32_t mbarrier, Site site);
bool mbarrier_try_wait(uint32_t mbarrier, unsigned parity, Scope scope, Memory memory, Site site);
void mbarrier_wait(uint32_t mbarrier, unsigned parity, Scope scope, Memory memory, Site site);

// Global or shared words that threads of several CTAs synchronise through.
void atomic_store(uint32_t* p, uint32_t value, Order order, Scope scope, Site site);
uint32_t atomic_load(const uint32_t* p, Order order, Scope scope, Site site);
uint32_t atomic_add(uint32_t* p, uint32_t value, Order order, Scope scope, Site site);
void fence_acq_rel(Scope scope, Site site);
void fence_proxy_async(Site site);
void spin_pause(Site site);  // the body of a polling loop: runs again after someone wrote a flag

}  // namespace emu
