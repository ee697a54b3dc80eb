// How work is shared among OpenMP threads, and when it is not worth sharing.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sora {

// Contiguous part `index` of `count` items, in `parts` nearly equal parts whose borders are multiples of `grain`.
struct Range {
  int64_t begin, end;
};
inline Range part_of(int64_t count, int64_t parts, int64_t index, int64_t grain = 1) {
  const int64_t grains = (count + grain - 1) / grain;
  return {std::min(count, grains * index / parts * grain), std::min(count, grains * (index + 1) / parts * grain)};
}

// Runs body(thread, team) on up to `threads` threads. The team may come out smaller
// than asked for (nested regions, limits of the runtime), so its size is read inside the region and work is shared by
// that. A team of one enters no OpenMP region: it is safe in a forked child, whose runtime has lost its threads.
template <class Body>
void run_team(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

// All threads of the team that run_team started. Must be reached by every one of them.
inline void team_barrier(int team) {
#ifdef _OPENMP
  if (team > 1) {
#pragma omp barrier
  }
#endif
  (void)team;
}

}  // namespace sora
