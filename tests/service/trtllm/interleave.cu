// FlashInfer's own kernel behind block_scale_interleave, callable without its Python.
#include <cuda_bf16.h>

#include <cstdint>

#include "tensorrt_llm/kernels/quantization.h"

namespace {
template <typename T>
void interleave(int experts, int rows, int columns, void const* in, void* out) {
  int const padded_rows = (rows + 127) / 128 * 128, padded_columns = (columns + 3) / 4 * 4;
  tensorrt_llm::kernels::invokeBlockScaleInterleave<T>(
      experts, rows, padded_rows, columns, padded_columns, static_cast<T const*>(in),
      static_cast<T*>(out), /*multiProcessorCount=*/132, /*stream=*/nullptr);
}
}  // namespace

extern "C" void interleave_uint8(int b, int m, int n, void const* in, void* out) {
  interleave<uint8_t>(b, m, n, in, out);
}
extern "C" void interleave_bfloat16(int b, int m, int n, void const* in, void* out) {
  interleave<__nv_bfloat16>(b, m, n, in, out);
}
