#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding/args.h"
#include "cuda/launch.h"
#include "cuda/pack.cuh"

namespace ddit_rt {
namespace {

constexpr size_t kMaxShared = 48 * 1024;  // without opting in for more

template <typename T, bool kPack>
void launch(const PatchShape& shape, const Tensor& latents, const Tensor& tokens) {
  if (latents.numel() == 0) return;
  const PackTiling tiling = pack_tiling(shape);
  const size_t shared = sizeof(T) * tiling.lines * tiling.pitch();
  STD_TORCH_CHECK(shared <= kMaxShared, "ddit_rt::pack: patch size ", shape.patch,
                  " is too large for the CUDA kernel");
  const int64_t blocks =
      shape.batch * shape.frames * shape.rows() * tiling.tiles * tiling.line_tiles;
  const LaunchContext context(latents);
  pack_kernel<T, kPack>
      <<<grid_size(blocks), dim3(kPackColumns, kPackRows), shared, context.stream()>>>(
          static_cast<T*>(latents.data_ptr()), static_cast<T*>(tokens.data_ptr()), shape, tiling);
  LaunchContext::check("pack_kernel");
}

template <bool kPack>
void launch(const PatchShape& shape, const Tensor& latents, const Tensor& tokens) {
  return latents.element_size() == 2 ? launch<uint16_t, kPack>(shape, latents, tokens)
                                     : launch<uint32_t, kPack>(shape, latents, tokens);
}

Tensor pack_cuda(Tensor latents, int64_t patch_size) {
  const PatchShape shape = pack_shape(latents, patch_size);
  Tensor tokens = new_tokens(latents, shape);
  launch<true>(shape, latents, tokens);
  return tokens;
}

Tensor unpack_cuda(Tensor tokens, int64_t patch_size, int64_t height, int64_t width,
                   int64_t frames) {
  const PatchShape shape = unpack_shape(tokens, patch_size, height, width, frames);
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
