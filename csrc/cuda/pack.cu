#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "binding/args.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"

namespace ddit_rt {
namespace {

using Kernel = void (*)(const unsigned char*, unsigned char*, pack::Params);

template <bool kPack>
Kernel kernel_of(uint32_t unit) {
  switch (unit) {
    case 2:
      return pack::pack_kernel<2, kPack>;
    case 4:
      return pack::pack_kernel<4, kPack>;
    case 8:
      return pack::pack_kernel<8, kPack>;
    default:
      return pack::pack_kernel<16, kPack>;
  }
}

template <bool kPack>
void launch(const PatchShape& shape, const Tensor& latents, const Tensor& tokens) {
  if (latents.numel() == 0) return;
  constexpr int64_t kMaxBytes = std::numeric_limits<int32_t>::max();
  const auto item = static_cast<int64_t>(latents.element_size());
  STD_TORCH_CHECK(shape.features() * item <= kMaxBytes && shape.width * item <= kMaxBytes,
                  "ddit_rt::", kPack ? "pack" : "unpack", ": ", shape.features(),
                  " features or a width of ", shape.width, " are too many for the CUDA kernel");
  void* const latent_bytes = latents.data_ptr();
  void* const token_bytes = tokens.data_ptr();
  const pack::Launch plan = pack::launch_of(shape, item, latent_bytes, token_bytes);
  grid_size(plan.warps);  // numbered with 31 bits, like blocks
  const LaunchContext context(latents);
  kernel_of<kPack>(plan.params.unit)<<<grid_size(plan.blocks), plan.threads, 0, context.stream()>>>(
      static_cast<const unsigned char*>(kPack ? latent_bytes : token_bytes),
      static_cast<unsigned char*>(kPack ? token_bytes : latent_bytes), plan.params);
  LaunchContext::check("pack_kernel");
}

Tensor pack_cuda(Tensor latents, int64_t patch_size, bool channels_last) {
  const PatchShape shape = pack_shape(latents, patch_size, channels_last);
  Tensor tokens = new_tokens(latents, shape);
  launch<true>(shape, latents, tokens);
  return tokens;
}

Tensor unpack_cuda(Tensor tokens, int64_t patch_size, int64_t height, int64_t width, int64_t frames,
                   bool channels_last) {
  const PatchShape shape = unpack_shape(tokens, patch_size, height, width, frames, channels_last);
  Tensor latents = new_latents(tokens, shape, frames > 0);
  launch<false>(shape, latents, tokens);
  return latents;
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CUDA, m) {
  m.impl("pack", TORCH_BOX(&ddit_rt::pack_cuda));
  m.impl("unpack", TORCH_BOX(&ddit_rt::unpack_cuda));
}
