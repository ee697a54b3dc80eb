// Places in reports: "lstm_resident.cuh:120".
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "machine.h"

namespace emu {
namespace {

std::string short_path(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

bool is_wrapper(const std::string& path) {
  return path.find("/csrc/common/") != std::string::npos || path.find("/csrc/emu/") != std::string::npos;
}

// The innermost line around the instruction that is not a wrapper's, by addr2line: only reports ask.
std::string line_of(uintptr_t instruction) {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(instruction), &info) || !info.dli_fname) return "";
  char command[1024];
  const uintptr_t offset = instruction - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname, size_t(offset));
  std::string best;
  if (FILE* pipe = popen(command, "r")) {
    char line[1024];
    while (fgets(line, sizeof line, pipe)) {
      std::string place = line;
      place.erase(place.find_last_not_of(" \n") + 1);
      if (const size_t more = place.find(" ("); more != std::string::npos) place.erase(more);
      if (place.empty() || place[0] == '?') continue;
      if (best.empty() || is_wrapper(best)) best = place;
    }
    pclose(pipe);
  }
  if (!best.empty()) return short_path(best);
  char text[512];
  snprintf(text, sizeof text, "%s+0x%zx", short_path(info.dli_fname).c_str(), size_t(offset));
  return text;
}

}  // namespace

std::string text(const Where& where) {
  if (where.file) return short_path(where.file) + ":" + std::to_string(where.at);
  return where.at ? line_of(where.at) : "the end of the kernel";
}

}  // namespace emu
