#pragma once

namespace sora {

// The record that setup.py made of this build, as JSON.
const char* build_info_json();

}  // namespace sora
