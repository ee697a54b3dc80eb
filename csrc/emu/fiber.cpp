#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#if !defined(SORA_EMU_USES_UCONTEXT)
extern "C" void sora_emu_swap(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.type sora_emu_swap, @function
sora_emu_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sora_emu_swap, .-sora_emu_swap
)");
constexpr size_t kSaved = 6, kReturn = 6, kFrame = 8;  // words; the frame keeps the stack aligned to 16
#else
asm(R"(
.text
.type sora_emu_swap, %function
sora_emu_swap:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size sora_emu_swap, .-sora_emu_swap
)");
constexpr size_t kSaved = 20, kReturn = 11, kFrame = 20;
#endif
#endif

namespace emu {
namespace {

constexpr size_t kGuardBytes = 4096;
std::vector<char*> stacks;

}  // namespace

char* stack(unsigned i) {
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    mprotect(p, kGuardBytes, PROT_NONE);
    stacks.push_back(static_cast<char*>(p) + kGuardBytes);
  }
  return stacks[i];
}

int overflowed_stack(const void* address) {
  const char* at = static_cast<const char*>(address);
  for (size_t i = 0; i < stacks.size(); ++i)
    if (at >= stacks[i] - kGuardBytes && at < stacks[i]) return int(i);
  return -1;
}

#if defined(SORA_EMU_USES_UCONTEXT)

void start(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStackBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
void swap(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#else

void start(Context& context, char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes) - kFrame;
  for (size_t i = 0; i < kFrame; ++i) top[i] = nullptr;
  static_assert(kSaved <= kFrame && kReturn < kFrame, "");
  top[kReturn] = reinterpret_cast<void*>(entry);
  context.stack_pointer = top;
}
void swap(Context& from, Context& to) { sora_emu_swap(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace emu
