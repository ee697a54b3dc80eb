#include "build_info.h"

namespace sora {

const char* build_info_json() {
  return
#include "sora_build_info.inc"
      ;
}

}  // namespace sora
