// The emulation for ctypes: tests/native/emulation.py.
#include <cstdio>

#include "emulation.h"

extern "C" {

void sora_emu_configure(uint64_t seed, int race) { emu::configure(emu::Options::from_seed(seed, race != 0)); }

// policy, delivery: the numbers of emu::Policy and emu::Delivery; -1 keeps what the seed gave.
void sora_emu_override(int policy, int delivery, double preempt, uint64_t max_switches) {
  emu::Options options = emu::options();
  if (policy >= 0) options.policy = emu::Policy(policy);
  if (delivery >= 0) options.delivery = emu::Delivery(delivery);
  if (preempt >= 0) options.preempt = preempt;
  if (max_switches) options.max_switches = max_switches;
  emu::configure(options);
}

void* sora_emu_allocate(size_t bytes, const char* name) { return emu::allocate(bytes, name); }
void sora_emu_release(void* memory) { emu::release(memory); }
void sora_emu_mutate(int site) { emu::mutation = site; }

int sora_emu_ok() { return emu::last_result().ok; }
const char* sora_emu_report() { return emu::last_result().report.c_str(); }
void sora_emu_counts(uint64_t (*counts)[4]) {
  const emu::Result& result = emu::last_result();
  (*counts)[0] = result.switches;
  (*counts)[1] = result.collectives;
  (*counts)[2] = result.copies;
  (*counts)[3] = result.accesses;
}

}  // extern "C"
