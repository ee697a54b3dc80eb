// Accesses to guard pages and to nowhere, as reports instead of a dead process.
#pragma once

namespace emu {

// Runs body; a SIGSEGV or SIGBUS in it ends the launch with a report that names the address and the instruction.
void with_faults_reported(void (*body)());

}  // namespace emu
