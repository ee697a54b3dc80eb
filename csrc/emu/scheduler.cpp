// Launches: which CTAs are resident, which thread runs next, when copies land, and how a launch ends.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <numeric>

#include "fault.h"
#include "machine.h"

namespace emu {

Machine machine;
int mutation = -1;

namespace {

Options configured;
uint64_t random_state;

// Policy::starve
enum Level { kThread, kWarp, kCta };
Level starved_level;
unsigned starved_number;
uint64_t starved_until;
bool starved_for_good;

void seed_random(uint64_t seed) {
  random_state = seed * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull;
  for (int i = 0; i < 4; ++i) random_bits();
}

bool is_starved(const Thread& thread) {
  switch (starved_level) {
    case kThread: return thread.number == starved_number;
    case kWarp: return thread.cta->slot * 32 + thread.warp() == starved_number;
    default: return thread.cta->slot == starved_number;
  }
}

void choose_starved() {
  if (machine.options.policy != Policy::starve || machine.result.switches < starved_until) return;
  const unsigned ctas = unsigned(machine.ctas.size()), warps = unsigned(machine.ctas[0]->warps.size());
  starved_level = Level(random_bits() % 3);
  if (starved_level == kThread) starved_number = unsigned(random_bits() % machine.threads.size());
  if (starved_level == kWarp) starved_number = unsigned(random_bits() % ctas * 32 + random_bits() % warps);
  if (starved_level == kCta) starved_number = unsigned(random_bits() % ctas);
  starved_until = starved_for_good ? ~0ull : machine.result.switches + (64ull << (2 * (random_bits() % 5)));
}

Thread* pick() {
  std::vector<Thread*>& ready = machine.ready;
  size_t i = 0;
  if (machine.options.policy == Policy::fifo) {
    Thread* first = ready.front();
    ready.erase(ready.begin());
    return first;
  }
  i = random_bits() % ready.size();
  if (machine.options.policy == Policy::starve && is_starved(*ready[i])) {
    for (size_t k = 0; k < ready.size(); ++k) {
      const size_t other = (i + k) % ready.size();
      if (is_starved(*ready[other])) continue;
      i = other;
      break;
    }
  }
  Thread* chosen = ready[i];
  ready[i] = ready.back();
  ready.pop_back();
  return chosen;
}

void thread_exits(Thread& thread) {
  Cta& cta = *thread.cta;
  Warp& warp = cta.warps[thread.warp()];
  const Where end;
  for (const auto& open : warp.open)
    if (open->mask >> thread.lane() & 1)
      fail_at(end, "%s exits while other lanes wait for it at %s", name(thread).c_str(), text(open->site).c_str());
  const Barrier& block_barrier = cta.barriers[0];
  if (block_barrier.arrived > 0)
    fail_at(end, "%s exits while others wait for it at the block barrier of %s", name(thread).c_str(),
            text(block_barrier.warp_site.begin()->second).c_str());
  warp.alive &= ~(1u << thread.lane());
  --cta.alive;
  --machine.alive;
  Cluster& cluster = *cta.cluster;
  --cluster.alive;  // PTX: the barrier of a cluster waits for its threads that have not exited
  if (thread.cluster_arrived) --cluster.arrived;
  if (cluster.alive > 0 && cluster.arrived == cluster.alive && cluster.arrived > 0)
    fail_at(end, "%s exits between the arrivals at a cluster barrier", name(thread).c_str());
}

void thread_main() {
  (*machine.kernel)();
  thread_exits(*machine.current);
  machine.current->state = Thread::done;
  swap(machine.current->context, machine.scheduler);
}

std::string deadlock() {
  std::map<std::string, std::pair<unsigned, std::string>> groups;
  for (const auto& thread : machine.threads) {
    if (thread->state == Thread::done) continue;
    const std::string where = std::string(thread->waits_for) + " (" + text(thread->site) + ")";
    auto& group = groups[where];
    if (group.first++ == 0) group.second = name(*thread);
  }
  std::string all;
  for (const auto& [where, group] : groups)
    all +=
        (all.empty() ? "" : "; ") + std::to_string(group.first) + " threads in " + where + ", such as " + group.second;
  return all;
}

void run_resident() {
  while (machine.alive > 0) {
    choose_starved();
    const bool lands =
        machine.options.delivery == Delivery::random && !machine.in_flight.empty() && chance(machine.options.deliver);
    if (lands || (machine.ready.empty() && !machine.in_flight.empty())) {
      machine.current = nullptr;
      deliver_one();
      memory_event();
      continue;
    }
    if (machine.ready.empty()) fail_at({}, "deadlock: %s", deadlock().c_str());
    if (++machine.result.switches > machine.options.max_switches)
      fail_at({}, "no end after %llu switches: %s", static_cast<unsigned long long>(machine.options.max_switches),
              deadlock().c_str());
    machine.current = pick();
    swap(machine.scheduler, machine.current->context);
    machine.current = nullptr;
    if (!machine.result.ok) throw Abort{};
  }
  while (!machine.in_flight.empty()) deliver_one();  // those that nobody waited for
}

void place_cluster(unsigned number) {
  const LaunchShape& shape = machine.shape;
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  machine.clusters.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *machine.clusters.back();
  cluster.number = number;
  for (unsigned rank = 0; rank < shape.cluster; ++rank) {
    machine.ctas.push_back(std::make_unique<Cta>());
    Cta& cta = *machine.ctas.back();
    cta.cluster = &cluster;
    cta.rank = rank;
    cta.number = number * shape.cluster + rank;
    cta.slot = unsigned(machine.ctas.size() - 1);
    cta.index.x = cta.number % shape.grid.x;
    cta.index.y = cta.number / shape.grid.x % shape.grid.y;
    cta.index.z = cta.number / shape.grid.x / shape.grid.y;
    map_shared(cta, shape.shared_bytes);
    cta.alive = threads;
    cta.warps.resize((threads + 31) / 32);
    cluster.ctas.push_back(&cta);
    cluster.alive += threads;
    for (unsigned i = 0; i < threads; ++i) {
      machine.threads.push_back(std::make_unique<Thread>());
      Thread& thread = *machine.threads.back();
      thread.cta = &cta;
      thread.index = i;
      thread.number = unsigned(machine.threads.size() - 1);
      Warp& warp = cta.warps[thread.warp()];
      warp.exists |= 1u << thread.lane();
      warp.alive = warp.exists;
      start(thread.context, stack(thread.number), thread_main);
      machine.ready.push_back(&thread);
      ++machine.alive;
    }
  }
}

void clear_resident() {
  machine.ready.clear();
  machine.polling.clear();
  machine.in_flight.clear();
  machine.threads.clear();
  unmap_shared();
  machine.ctas.clear();
  machine.clusters.clear();
  machine.alive = 0;
}

std::string refusal(const LaunchShape& shape) {  // what the driver would refuse
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  if (threads == 0 || threads > 1024) return "a block has " + std::to_string(threads) + " threads: expected 1 to 1024";
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return "the grid is empty";
  if (shape.shared_bytes > kMaxSharedBytes)
    return std::to_string(shape.shared_bytes) + " bytes of shared memory: at most " + std::to_string(kMaxSharedBytes);
  if (shape.cluster == 0 || shape.cluster > 16) return "a cluster has " + std::to_string(shape.cluster) + " CTAs";
  if (shape.grid.x % shape.cluster) return "grid.x is not a multiple of the cluster";
  if (size_t(shape.grid.x) * shape.grid.y * shape.grid.z > 0xffff) return "more CTAs than the emulation numbers";
  return "";
}

void run_grid() {
  const LaunchShape& shape = machine.shape;
  const unsigned clusters = shape.grid.x * shape.grid.y * shape.grid.z / shape.cluster;
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z * shape.cluster;
  unsigned together = std::min(clusters, std::max(1u, machine.options.resident_threads / threads));
  if (shape.cooperative) {
    together = clusters;
  } else if (machine.options.policy != Policy::fifo && chance(0.25)) {
    together = 1 + unsigned(random_bits() % together);
  }
  std::vector<unsigned> order(clusters);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.options.policy != Policy::fifo)
    for (unsigned i = clusters; i-- > 1;) std::swap(order[i], order[random_bits() % (i + 1)]);
  for (unsigned first = 0; first < clusters; first += together) {
    for (unsigned i = first; i < std::min(clusters, first + together); ++i) place_cluster(order[i]);
    starved_until = 0;
    run_resident();
    clear_resident();
  }
  check_slack();
}

}  // namespace

uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545F4914F6CDD1Dull >> 16;
}

bool chance(double probability) {
  return probability > 0 && double(random_bits() & 0xffffff) < probability * 0x1000000;
}

Options Options::from_seed(uint64_t seed, bool race) {
  Options options;
  options.seed = seed;
  options.race = race;
  options.policy = seed == 0 ? Policy::fifo : seed % 3 == 1 ? Policy::uniform : Policy::starve;
  options.delivery = Delivery((seed + seed / 3) % 3);
  options.deliver = seed / 9 % 2 ? 0.0005 : 0.02;
  return options;
}

void configure(const Options& options) { configured = options; }
const Options& options() { return configured; }
const Result& last_result() { return machine.result; }

Result launch(const LaunchShape& shape, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  machine.options = configured;
  machine.shape = shape;
  machine.result = {};
  machine.kernel = &thread;
  if (const std::string why = refusal(shape); !why.empty()) {
    machine.result.ok = false;
    machine.result.report = "launch refused: " + why;
    return machine.result;
  }
  seed_random(configured.seed);
  starved_for_good = chance(0.5);
  reset_records();
  machine.running = true;
  try {
    with_faults_reported(run_grid);
  } catch (const Abort&) {
    machine.result.ok = false;
  }
  machine.running = false;
  machine.current = nullptr;
  clear_resident();
  forget_flags();
  return machine.result;
}

void fail_at(const Where& where, const char* format, ...) {
  char message[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  Thread* thread = machine.current;
  machine.current = nullptr;
  std::string report = message;
  if (where.file || where.at) report = text(where) + ": " + report;
  if (thread && report.find("thread ") == std::string::npos) report += " [" + name(*thread) + "]";
  if (machine.result.ok) machine.result.report = report;
  machine.result.ok = false;
  if (!thread) throw Abort{};
  Context abandoned;  // never resumed: no unwinding through fibers
  swap(abandoned, machine.scheduler);
  __builtin_unreachable();
}

void fail(Site site, const char* format, ...) {
  char message[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  fail_at(site, "%s", message);
}

std::string name(const Thread& thread) {
  char text[96];
  const Index3& cta = thread.cta->index;
  const LaunchShape& shape = machine.shape;
  if (shape.grid.y * shape.grid.z > 1)
    snprintf(text, sizeof text, "thread %u of CTA (%u, %u, %u)", thread.index, cta.x, cta.y, cta.z);
  else
    snprintf(text, sizeof text, "thread %u of CTA %u", thread.index, cta.x);
  return text;
}

void wake(Thread* thread) {
  thread->state = Thread::ready;
  machine.ready.push_back(thread);
}

void block(const char* waits_for, Site site) {
  Thread* thread = machine.current;
  thread->state = Thread::waiting;
  thread->waits_for = waits_for;
  thread->site = site;
  swap(thread->context, machine.scheduler);
}

void yield_now() {
  wake(machine.current);
  swap(machine.current->context, machine.scheduler);
}

void preempt_point() {
  if (chance(machine.options.preempt)) yield_now();
}

void memory_event() {
  for (Thread* thread : machine.polling) wake(thread);
  machine.polling.clear();
}

void spin_pause(Site site) {
  machine.polling.push_back(machine.current);
  block("a polling loop", site);
}

Index3 thread_index() {
  const unsigned i = machine.current->index;
  const Index3& block = machine.shape.block;
  return {i % block.x, i / block.x % block.y, i / block.x / block.y};
}
Index3 block_index() { return machine.current->cta->index; }
Index3 block_size() { return machine.shape.block; }
Index3 grid_size() { return machine.shape.grid; }
unsigned lane() { return machine.current->lane(); }
unsigned warp() { return machine.current->warp(); }
unsigned cluster_rank() { return machine.current->cta->rank; }
unsigned cluster_size() { return unsigned(machine.current->cta->cluster->ctas.size()); }

}  // namespace emu
