// Which instantiation runs. For each element type and cell:
//   plain    H is 32, 64 or (16 bits) 128, all rows have T steps, no resets
//   ragged   the same H, with lengths, offsets, resets
//   pairs    any even H up to the kernel's, and all of ragged
//   singles  the same for odd H and odd addresses, of one size
#pragma once

#include "resident_launch.h"
#include "resident_traits.cuh"

namespace sora {
namespace resident {

// Pass: Args, and kernel<Element, kUnits, kCell, kAccess, kRagged>, Shared<Element, kUnits, kCell>.
template <class Pass, class Element, int kUnits, Cell kCell, Access kAccess, bool kRagged>
int launch(const typename Pass::Args& args, const Target& target) {
  const auto& shape = args.shape;
  LaunchConfig config;
  config.grid = {unsigned((shape.B + kRows - 1) / kRows), unsigned(shape.D), unsigned(shape.members)};
  config.block.x = 2 * kUnits;
  config.shared_bytes = sizeof(typename Pass::template Shared<Element, kUnits, kCell>);
  constexpr auto kernel = Pass::template kernel<Element, kUnits, kCell, kAccess, kRagged>;
  if (target.plan == nullptr) return launch_kernel(kernel, config, target.stream, args);
  auto& plan = *target.plan;
  plan.units = kUnits;
  plan.ctas = int64_t(config.grid.x) * config.grid.y * config.grid.z;
  plan.threads = int(config.block.x);
  plan.shared_bytes = int(config.shared_bytes);
  return registers_of(kernel, plan.registers);
}

template <class Pass, class Element, int kUnits, Cell kCell>
int launch_exact(const typename Pass::Args& args, const Target& target) {
  const auto& shape = args.shape;
  if (shape.lengths || shape.offsets || shape.reset)
    return launch<Pass, Element, kUnits, kCell, Access::exact, true>(args, target);
  return launch<Pass, Element, kUnits, kCell, Access::exact, false>(args, target);
}

// Sizes differ in a number: the emulation compiles the largest, and of 16 bits the smallest too.
#if defined(SORA_HOST_EMULATION)
constexpr bool kAllSizes = false;
#else
constexpr bool kAllSizes = true;
#endif

template <class Pass, class Element, Cell kCell>
int launch_cell(const typename Pass::Args& args, Access access, const Target& target) {
  constexpr int kMost = sizeof(Element) == 2 ? 128 : 64, kHalf = kMost / 2;
  const int64_t H = args.shape.H;
  if (access == Access::exact) {
    if (H == kMost) return launch_exact<Pass, Element, kMost, kCell>(args, target);
    if constexpr (kAllSizes)
      if (H == kHalf) return launch_exact<Pass, Element, kHalf, kCell>(args, target);
    if constexpr (kHalf > 32)
      if (H == 32) return launch_exact<Pass, Element, 32, kCell>(args, target);
  }
  if (access == Access::singles) return launch<Pass, Element, kMost, kCell, Access::singles, true>(args, target);
  if constexpr (kAllSizes)
    if (H <= kHalf) return launch<Pass, Element, kHalf, kCell, Access::pairs, true>(args, target);
  return launch<Pass, Element, kMost, kCell, Access::pairs, true>(args, target);
}

template <class Pass, class Element>
int launch_pass(const typename Pass::Args& args, Access access, const Target& target) {
  switch (args.shape.cell) {
    case Cell::lstm: return launch_cell<Pass, Element, Cell::lstm>(args, access, target);
    case Cell::gru: return launch_cell<Pass, Element, Cell::gru>(args, access, target);
    default: return launch_cell<Pass, Element, Cell::rnn_tanh>(args, access, target);
  }
}

}  // namespace resident
}  // namespace sora
