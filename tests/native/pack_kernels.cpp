// The pack kernel behind C functions that Python calls with tensors' addresses. They repeat the
// launch of pack.cu; the kernel and its plan are the shipped ones.

// The emulator defines what the kernel's header expects of nvcc, so it must come first.
// clang-format off
#include "emulator.h"
// clang-format on

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <set>

#include "cuda/pack.cuh"

namespace ddit_rt {
namespace {

// shape: b, c, f, h, w, p, channels last.
PatchShape shape_of(const int64_t* shape) {
  return {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6] != 0};
}

template <int kUnit>
void run(const pack::Launch& launch, bool packs, void* latents, void* tokens) {
  auto* const latent_bytes = static_cast<unsigned char*>(latents);
  auto* const token_bytes = static_cast<unsigned char*>(tokens);
  const dim3 grid{static_cast<unsigned>(launch.blocks)};
  emulator::launch(grid, {static_cast<unsigned>(launch.threads)}, [&] {
    if (packs)
      pack::pack_kernel<kUnit, true>(latent_bytes, token_bytes, launch.params);
    else
      pack::pack_kernel<kUnit, false>(token_bytes, latent_bytes, launch.params);
  });
}

// Global memory moves in sectors of 32 bytes, as many as the threads of a warp touch together.
struct Traffic {
  int64_t bytes = 0;
  int64_t sectors = 0;

  void add(const std::vector<uint64_t>& addresses, int64_t width) {
    std::set<uint64_t> touched;
    for (const uint64_t address : addresses) {
      for (uint64_t i = address / 32; i <= (address + width - 1) / 32; ++i) touched.insert(i);
    }
    bytes += static_cast<int64_t>(addresses.size()) * width;
    sectors += static_cast<int64_t>(touched.size());
  }
};

template <int kUnit, int kUnits>
void count_warp(const pack::Params& p, uint32_t warp, Traffic* latents, Traffic* tokens) {
  for (uint32_t repeat = 0; repeat < p.repeats; ++repeat) {
    std::vector<pack::Tile> tiles;
    for (uint32_t lane = 0; lane < pack::kLanes; ++lane) {
      const pack::Start start = pack::start_of(p, warp, lane);
      const pack::Tile tile = pack::tile_of<kUnit, kUnits>(p, start, repeat);
      if (tile.inside) tiles.push_back(tile);
    }
    std::vector<uint64_t> addresses(tiles.size());
    for (uint32_t i = 0; i < p.tile_lines; ++i) {
      std::transform(tiles.begin(), tiles.end(), addresses.begin(),
                     [&](const pack::Tile& tile) { return tile.latents + p.line_at[i]; });
      latents->add(addresses, p.latent_access);
    }
    for (int j = 0; j < kUnits; ++j) {
      std::transform(tiles.begin(), tiles.end(), addresses.begin(),
                     [&](const pack::Tile& tile) { return tile.tokens + p.unit_at[j]; });
      tokens->add(addresses, p.token_access);
    }
  }
}

template <int kUnit>
void count(const pack::Params& p, Traffic* latents, Traffic* tokens) {
  pack::with_count<pack::kAccessBytes / kUnit>(p.latent_access / kUnit, [&](auto units) {
    for (uint32_t warp = 0; warp < p.warps; ++warp) {
      count_warp<kUnit, decltype(units)::kCount>(p, warp, latents, tokens);
    }
  });
}

}  // namespace
}  // namespace ddit_rt

using namespace ddit_rt;

extern "C" {

// g++ -fsanitize=alignment calls this for an access that is not as aligned as it is wide, which a
// GPU refuses and an x86 mostly forgives.
void __ubsan_handle_type_mismatch_v1(void*, void*) {
  std::fputs("misaligned access\n", stderr);
  std::abort();
}

// plan: what the host chose, in the order of `values`.
void plan_pack(const int64_t* shape, int64_t item, const void* latents, const void* tokens,
               int64_t* plan) {
  const pack::Launch launch = pack::launch_of(shape_of(shape), item, latents, tokens);
  const pack::Params& p = launch.params;
  const int64_t values[] = {p.unit, p.latent_access, p.token_access, launch.threads, launch.blocks};
  std::copy(std::begin(values), std::end(values), plan);
}

void emulate_pack(const int64_t* shape, int64_t item, void* latents, void* tokens, bool packs) {
  const pack::Launch launch = pack::launch_of(shape_of(shape), item, latents, tokens);
  if (launch.params.unit == 2) run<2>(launch, packs, latents, tokens);
  if (launch.params.unit == 4) run<4>(launch, packs, latents, tokens);
  if (launch.params.unit == 8) run<8>(launch, packs, latents, tokens);
  if (launch.params.unit == 16) run<16>(launch, packs, latents, tokens);
}

// traffic: bytes and sectors on the side of the latents, then of the tokens, for aligned tensors.
void count_traffic(const int64_t* shape, int64_t item, int64_t* traffic) {
  const pack::Params p = pack::launch_of(shape_of(shape), item, nullptr, nullptr).params;
  Traffic latents, tokens;
  if (p.unit == 2) count<2>(p, &latents, &tokens);
  if (p.unit == 4) count<4>(p, &latents, &tokens);
  if (p.unit == 8) count<8>(p, &latents, &tokens);
  if (p.unit == 16) count<16>(p, &latents, &tokens);
  const int64_t values[] = {latents.bytes, latents.sectors, tokens.bytes, tokens.sectors};
  std::copy(std::begin(values), std::end(values), traffic);
}

// The bytes at which the last tile ends in latents and in tokens.
void end_of_tensors(const int64_t* shape, int64_t item, uint64_t* ends) {
  const pack::Params p = pack::launch_of(shape_of(shape), item, nullptr, nullptr).params;
  const uint32_t along = (p.vectors - 1) % (1u << p.lane_bits);
  const uint32_t across = (p.tile_rows - 1) % (pack::kLanes >> p.lane_bits);
  const uint32_t repeat = (p.vectors - 1) % (p.repeats << p.lane_bits) >> p.lane_bits;
  const pack::Start start = pack::start_of(p, p.warps - 1, (across << p.lane_bits) + along);
  pack::Tile tile{};
  if (p.unit == 4) tile = pack::tile_of<4, 4>(p, start, repeat);
  if (p.unit == 8) tile = pack::tile_of<8, 2>(p, start, repeat);
  ends[0] = tile.latents + p.line_at[p.tile_lines - 1] + p.latent_access;
  ends[1] = tile.tokens + p.unit_at[p.latent_access / p.unit - 1] + p.token_access;
}

void load_16_bytes(const void* address) {
  pack::Vector<4, 4> vector = *static_cast<const pack::Vector<4, 4>*>(address);
  asm volatile("" : : "r"(&vector) : "memory");  // so that the load is not left out
}

// quotients[i] = numbers[i] / divisor, the way a kernel does it.
void divide(int64_t divisor, const int32_t* numbers, int32_t* quotients, int64_t count) {
  const Divisor by(divisor);
  for (int64_t i = 0; i < count; ++i) quotients[i] = by.quotient(numbers[i]);
}

}  // extern "C"
