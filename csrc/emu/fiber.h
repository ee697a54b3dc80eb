// A stack of its own for every CUDA thread, and the switch between two of them.
#pragma once

#include <cstddef>

#if (!defined(__x86_64__) && !defined(__aarch64__)) || defined(SORA_EMU_UCONTEXT)
#define SORA_EMU_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emu {

struct Context {
#if defined(SORA_EMU_USES_UCONTEXT)
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
};

constexpr size_t kStackBytes = 128 * 1024;

// The lowest address of the i-th stack, which lies above a guard page. Stacks are kept for later launches.
char* stack(unsigned i);
// Which stack's guard page holds the address; -1: none.
int overflowed_stack(const void* address);

void start(Context& context, char* stack, void (*entry)());
void swap(Context& from, Context& to);

}  // namespace emu
