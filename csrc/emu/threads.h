// An instruction that the lanes of a warp execute together: each lane joins, the last one does the work for all.
#pragma once

#include "machine.h"

namespace emu {

constexpr uint32_t kAllLanes = 0xffffffffu;
enum WarpKind { kSyncWarp, kShuffle, kBallot, kLdmatrix, kMma };

bool same_site(Site a, Site b);

// Null if another lane completed the operation while this one waited. mask loses the lanes that never existed.
WarpOperation* join_warp(int kind, uint32_t& mask, void* argument, bool aligned, Site site);
void complete_warp(WarpOperation* operation);

}  // namespace emu
