// What every back end and csrc/torch agree on.
#pragma once

namespace fused_losses {

enum class DType : int { f32, f64, bf16, f16 };
enum class Reduction : int { none, mean, sum };  // torch's numbering

constexpr int kMaxDims = 12;

}  // namespace fused_losses
