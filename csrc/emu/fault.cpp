#include "fault.h"

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <vector>

#include "machine.h"
#if defined(__linux__)
#include <ucontext.h>
#endif

namespace emu {
namespace {

sigjmp_buf landing;
void* fault_address;
void* fault_instruction;

void* instruction_of(void* context) {
#if defined(__linux__) && defined(__x86_64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__linux__) && defined(__aarch64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#else
  (void)context;
  return nullptr;
#endif
}

void handler(int signal, siginfo_t* info, void* context) {
  if (!machine.running || !machine.current) {  // the emulator's own fault
    std::signal(signal, SIG_DFL);
    return;
  }
  fault_address = info->si_addr;
  fault_instruction = instruction_of(context);
  siglongjmp(landing, 1);
}

class Handlers {
 public:
  Handlers() {
    stack_t own{};
    own.ss_sp = stack_.data();
    own.ss_size = stack_.size();
    sigaltstack(&own, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_[0]);
    sigaction(SIGBUS, &action, &previous_[1]);
  }
  ~Handlers() {
    sigaction(SIGSEGV, &previous_[0], nullptr);
    sigaction(SIGBUS, &previous_[1], nullptr);
    if (previous_stack_.ss_flags & SS_DISABLE) previous_stack_.ss_size = MINSIGSTKSZ;
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  std::vector<char> stack_ = std::vector<char>(64 * 1024);
  stack_t previous_stack_{};
  struct sigaction previous_[2]{};
};

}  // namespace

void with_faults_reported(void (*body)()) {
  const Handlers handlers;
  if (sigsetjmp(landing, 1) == 0) {
    body();
    return;
  }
  const std::string thread = machine.current ? name(*machine.current) : "";
  machine.current = nullptr;  // the fiber is abandoned where it stands
  // An instruction's address stands for the return address after it: text() looks one byte before.
  const Where where(static_cast<const char*>(fault_instruction) + 1);
  if (const int stack = overflowed_stack(fault_address); stack >= 0)
    fail_at(where, "stack overflow: a thread has %zu bytes of local variables [%s]", kStackBytes, thread.c_str());
  fail_at(where, "out of bounds: access at %s [%s]", describe_address(fault_address).c_str(), thread.c_str());
}

}  // namespace emu
