// What the kernels use of the OpenMP runtime, on std::thread: ThreadSanitizer does not see inside libgomp, whose barriers
// are not there for it, and reports every use of one as a race. Linked in libgomp's place.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  explicit Team(int size) : size(size) {}
  const int size;
  std::mutex mutex;
  std::condition_variable all_here;
  int waiting = 0;
  unsigned round = 0;
};

thread_local Team* t_team = nullptr;
thread_local int t_number = 0;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team team(threads ? static_cast<int>(threads) : 1);
  Team* const outer = t_team;
  const int outer_number = t_number;
  const auto run = [&](int number) {
    t_team = &team;
    t_number = number;
    body(data);
  };
  std::vector<std::thread> others;
  for (int number = 1; number < team.size; ++number) others.emplace_back(run, number);
  run(0);
  for (std::thread& other : others) other.join();
  t_team = outer;
  t_number = outer_number;
}

void GOMP_barrier() {
  if (!t_team) return;
  std::unique_lock<std::mutex> lock(t_team->mutex);
  const unsigned round = t_team->round;
  if (++t_team->waiting == t_team->size) {
    t_team->waiting = 0;
    ++t_team->round;
    t_team->all_here.notify_all();
    return;
  }
  t_team->all_here.wait(lock, [&] { return t_team->round != round; });
}

int omp_get_thread_num() { return t_number; }
int omp_get_num_threads() { return t_team ? t_team->size : 1; }
int omp_get_max_threads() { return 3; }
int omp_in_parallel() { return t_team && t_team->size > 1; }
}
