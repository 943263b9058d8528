// Schemas of the ops. The CPU kernels are registered beside their code, the CUDA kernels by
// `_ops_cuda`, the fakes (shapes without data) by Python, in `ddit_rt/ops`.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ddit_rt, m) {
  m.def("pack(Tensor latents, int patch_size, bool channels_last=False) -> Tensor");
  m.def(
      "unpack(Tensor tokens, int patch_size, int height, int width, int frames=0, "
      "bool channels_last=False) -> Tensor");
  m.def(
      "patch_scores(Tensor history, int[] patch_sizes, float quantile, int order=3, int head=0) "
      "-> Tensor");
  m.def("attention(Tensor query, Tensor key, Tensor value, float scale) -> Tensor");
  m.def("linear(Tensor values, Tensor weight, Tensor? bias=None, bool gelu=False) -> Tensor");
  m.def("norm_rotate(Tensor values, Tensor weight, Tensor cos, Tensor sin, float eps) -> Tensor");
  m.def(
      "solver_step_(Tensor(a!) history, Tensor(b!) velocities, Tensor velocity, "
      "Tensor coefficients, int step) -> ()");
  m.def(
      "decide_(Tensor scores, Tensor forced, Tensor thresholds, Tensor(a!) state, "
      "Tensor(b!) record, int step, int dwell, bool monotone) -> ()");
  m.def(
      "decide_reuse_(Tensor signal, Tensor increments, Tensor coefficients, Tensor(a!) state, "
      "Tensor(b!) memory, Tensor(c!) record, int step, int buckets, float threshold, int limit, "
      "int growth) -> ()");
}
