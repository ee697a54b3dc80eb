// Global and shared memory: between guard pages, filled with NaN, and with every checked access held to its bounds.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"
#include "region.h"

namespace emu {
namespace {

constexpr size_t kGuard = 64 << 20;  // of addresses, not of memory: an index far off still meets it
constexpr unsigned char kPoison = 0xff;
constexpr uint32_t kFirstOffset = 1024;  // a shared address is never 0, as on the GPU
constexpr uint32_t kWindow = 1u << 24;   // of one CTA: rank + 1; window 0 is the CTA's own

std::vector<std::unique_ptr<Region>> regions;  // by address
Region* last_region;

size_t page_rounded(size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

// The last byte lies before a guard page, as far as the alignment allows.
Region* map_region(size_t bytes, size_t alignment) {
  auto region = std::make_unique<Region>();
  const size_t inner = std::max(page_rounded(bytes), page_rounded(1)),
               rounded = (bytes + alignment - 1) / alignment * alignment;
  region->outer_bytes = kGuard + inner + kGuard;
  void* outer = mmap(nullptr, region->outer_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (outer == MAP_FAILED) fail_at({}, "no memory for %zu bytes", bytes);
  region->outer = static_cast<unsigned char*>(outer);
  unsigned char* pages = region->outer + kGuard;
  mprotect(pages, inner, PROT_READ | PROT_WRITE);
  std::memset(pages, kPoison, inner);
  region->begin = pages + inner - rounded;
  region->bytes = bytes;
  Region* raw = region.get();
  const auto place = std::upper_bound(regions.begin(), regions.end(), region,
                                      [](const auto& a, const auto& b) { return a->outer < b->outer; });
  regions.insert(place, std::move(region));
  return raw;
}

void unmap(const Region& region) { munmap(region.outer, region.outer_bytes); }

template <class Which>
void remove_regions(Which which) {
  last_region = nullptr;
  for (const auto& region : regions)
    if (which(*region)) unmap(*region);
  regions.erase(std::remove_if(regions.begin(), regions.end(), [&](const auto& r) { return which(*r); }),
                regions.end());
}

Region* region_of(const void* p) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (last_region && at >= last_region->outer && at < last_region->outer + last_region->outer_bytes) return last_region;
  auto after = std::upper_bound(regions.begin(), regions.end(), at,
                                [](const unsigned char* a, const auto& region) { return a < region->outer; });
  if (after == regions.begin()) return nullptr;
  Region* region = std::prev(after)->get();
  if (at >= region->outer + region->outer_bytes) return nullptr;
  last_region = region;
  return region;
}

std::string offset_text(const Region& region, const void* p) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - region.begin;
  char text[160];
  snprintf(text, sizeof text, "%s %c %td (of %zu bytes)", region.name.c_str(), offset < 0 ? '-' : '+',
           offset < 0 ? -offset : offset, region.bytes);
  return text;
}

}  // namespace

void* allocate(size_t bytes, const char* name) {
  Region* region = map_region(bytes, 16);
  region->name = name;
  return region->begin;
}

void release(void* memory) {
  remove_regions([&](const Region& region) { return region.begin == memory && !region.cta; });
}

void map_shared(Cta& cta, size_t bytes) {
  Region* region = map_region(bytes, 1024);
  region->cta = &cta;
  region->name = "shared memory of CTA " + std::to_string(cta.number);
  cta.shared = region->begin;
  cta.shared_bytes = bytes;
}

void unmap_shared() {
  remove_regions([](const Region& region) { return region.cta != nullptr; });
}

void check_slack() {
  for (const auto& region : regions) {
    if (region->cta) continue;
    const unsigned char* end = region->outer + region->outer_bytes - kGuard;
    for (const unsigned char* p = region->begin + region->bytes; p < end; ++p)
      if (*p != kPoison) fail_at({}, "out of bounds: something wrote %s", offset_text(*region, p).c_str());
  }
}

std::string describe_address(const void* p) {
  char text[96];
  snprintf(text, sizeof text, "address 0x%zx", reinterpret_cast<size_t>(p));
  const Region* region = region_of(p);
  return region ? offset_text(*region, p) : text;
}

Region* check_access(const void* p, size_t bytes, const Cta* cta, bool write, const Where& where) {
  Region* region = region_of(p);
  if (!region) return nullptr;
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < region->begin || at + bytes > region->begin + region->bytes)
    fail_at(where, "out of bounds: %zu-byte %s at %s", bytes, write ? "write" : "read",
            offset_text(*region, p).c_str());
  if (region->cta && cta && region->cta != cta)
    fail_at(where, "plain %s of the %s, which is another CTA's", write ? "write" : "read", region->name.c_str());
  return region;
}

std::vector<std::unique_ptr<Region>>& all_regions() { return regions; }
std::string place_text(const Region& region, const void* p) { return offset_text(region, p); }
Region* find_region(const void* p) { return region_of(p); }

// shared addresses

uint32_t offset_of(uint32_t address) { return address % kWindow - kFirstOffset; }

void* shared_memory(size_t bytes, Site site) {
  const Cta& cta = *machine.current->cta;
  if (bytes > cta.shared_bytes)
    fail(site, "the struct takes %zu bytes of shared memory, the launch gave %zu", bytes, cta.shared_bytes);
  return cta.shared;
}

uint32_t shared_address(const void* p, Site site) {
  const Cta& cta = *machine.current->cta;
  const ptrdiff_t offset = static_cast<const unsigned char*>(p) - cta.shared;
  if (offset < 0 || size_t(offset) > cta.shared_bytes)
    fail(site, "shared_address of %s: not in the shared memory of this CTA", describe_address(p).c_str());
  return uint32_t(offset) + kFirstOffset;
}

uint32_t map_to_rank(uint32_t address, unsigned rank, Site site) {
  const size_t size = machine.current->cta->cluster->ctas.size();
  if (rank >= size) fail(site, "map_to_rank: rank %u in a cluster of %zu", rank, size);
  return address % kWindow + (rank + 1) * kWindow;
}

Cta* target_of(uint32_t address, bool cluster_space, Site site) {
  Cta* own = machine.current->cta;
  const uint32_t window = address / kWindow;
  if (window == 0 || window == own->rank + 1) return own;
  if (!cluster_space)
    fail(site, "an address of CTA rank %u given to an instruction on this CTA's shared memory", window - 1);
  if (window > own->cluster->ctas.size()) fail(site, "%08x is no shared address of the cluster", address);
  return own->cluster->ctas[window - 1];
}

unsigned char* shared_pointer(uint32_t address, unsigned bytes, unsigned align, bool cluster_space, Site site) {
  const Cta* cta = target_of(address, cluster_space, site);
  const int64_t offset = int64_t(address % kWindow) - kFirstOffset;
  if (offset < 0 || size_t(offset) + bytes > cta->shared_bytes)
    fail(site, "out of bounds: %u bytes at shared memory of CTA %u %+lld of %zu bytes", bytes, cta->number,
         static_cast<long long>(offset), cta->shared_bytes);
  if (offset % align)
    fail(site, "misaligned: shared memory + %lld needs a multiple of %u", static_cast<long long>(offset), align);
  if (cta->alive == 0) fail(site, "shared memory of CTA rank %u, which has exited", cta->rank);
  return cta->shared + offset;
}

// accesses through wrappers

namespace {

void check(const void* p, unsigned bytes, bool write, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(site, "misaligned: %u-byte access at %s", bytes, describe_address(p).c_str());
  check_access(p, bytes, machine.current->cta, write, site);
  if (chance(machine.options.preempt_access)) yield_now();
  record(*machine.current, p, bytes, write ? kWrite : kRead, site);
}

}  // namespace

void load(void* to, const void* p, unsigned bytes, Site site) {
  check(p, bytes, false, site);
  std::memcpy(to, p, bytes);
}
void store(void* p, const void* from, unsigned bytes, Site site) {
  check(p, bytes, true, site);
  std::memcpy(p, from, bytes);
}
void store_cluster(uint32_t address, const void* value, unsigned bytes, Site site) {
  preempt_point();
  unsigned char* p = shared_pointer(address, bytes, bytes, true, site);
  record(*machine.current, p, bytes, kWrite, site);
  std::memcpy(p, value, bytes);
}
void load_cluster(void* value, uint32_t address, unsigned bytes, Site site) {
  preempt_point();
  const unsigned char* p = shared_pointer(address, bytes, bytes, true, site);
  record(*machine.current, p, bytes, kRead, site);
  std::memcpy(value, p, bytes);
}

}  // namespace emu
