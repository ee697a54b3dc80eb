// A stretch of global or shared memory, and what the race detector remembers of it.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace emu {

// One earlier access to some of the four bytes of a cell.
struct Record {
  Agent agent;
  uint32_t step;
  Where where;
  uint8_t bytes;   // a bit for each
  uint8_t access;  // of Access
};
using Cell = std::vector<Record>;

struct Region {
  unsigned char* outer = nullptr;  // with its guards
  size_t outer_bytes = 0;
  unsigned char* begin = nullptr;
  size_t bytes = 0;
  std::string name;
  const Cta* cta = nullptr;  // of shared memory
  std::vector<Cell> cells;   // made at the first access of a launch
};

std::vector<std::unique_ptr<Region>>& all_regions();
Region* find_region(const void* p);
std::string place_text(const Region& region, const void* p);  // "y + 12 of 64 bytes"

}  // namespace emu
