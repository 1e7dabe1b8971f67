// Cross entropy and softmax focal loss as ops on CPU tensors, each as
//   NAME, NAME_train, NAME_train_, NAME_backward, NAME_backward_      (see torch/elementwise.cpp)
// Shapes: logits [C], [N, C] or [N, C, d1, ...]; target of the same shape without C (int64 class indices) or of the
// logits' shape (probabilities, cross entropy only); weight [C] in the compute dtype.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

#include "torch/tensors.h"

namespace fused_losses {
namespace {

using cpu::SoftmaxArgs;

constexpr int64_t kChunkElements = 16384;  // what a thread takes at a time, about
constexpr int64_t kShortRow = 32;          // classes; below it, a vector of neighbouring rows beats one row's vector

struct Options {
  OptionalTensor weight;  // [C]
  int64_t ignore_index;
  double label_smoothing, gamma;
  bool count_weights;
  Reduction reduction;
};

int64_t class_dim(const Tensor& logits) { return logits.dim() > 1 ? 1 : 0; }

// Fills the position strides of every [.., C, ..] tensor, merging dimensions that all of them walk through evenly.
// The order stays: positions are numbered as the target is.
void collapse(SoftmaxArgs& args, const Tensor& logits, const Tensor* grad, const Tensor* probability) {
  const Tensor* tensors[] = {&logits, grad, probability};
  int64_t* strides[] = {args.logits_stride, args.grad_stride, args.probability_stride};
  args.ndim = 0;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    const int64_t size = logits.size(d);
    if (d == class_dim(logits) || size == 1) continue;
    bool merges = args.ndim > 0;
    for (int k = 0; k < 3; ++k)
      if (tensors[k] && merges) merges = strides[k][args.ndim - 1] == size * tensors[k]->stride(d);
    if (!merges) args.size[args.ndim++] = 1;
    args.size[args.ndim - 1] *= size;
    for (int k = 0; k < 3; ++k)
      if (tensors[k]) strides[k][args.ndim - 1] = tensors[k]->stride(d);
  }
  if (args.ndim == 0) {
    args.ndim = 1;
    args.size[0] = 1;
  }
}

Tensor run(const Tensor& logits, Tensor target, const Options& options, const Tensor* upstream, Tensor* grad) {
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.dim() <= kMaxDims, "input has ", logits.dim(),
                  " dimensions; expected 1 to ", kMaxDims);
  const bool forward = upstream == nullptr, none = options.reduction == Reduction::none;
  const int64_t dim = class_dim(logits), classes = logits.size(dim);
  STD_TORCH_CHECK(classes > 0, "input has no classes: dimension ", dim, " has size 0");

  SoftmaxArgs args{};
  args.dtype = dtype_of(logits, "input");
  args.classes = classes;
  args.positions = logits.numel() / classes;
  args.logits = logits.data_ptr();
  args.logits_class_stride = classes == 1 ? 1 : logits.stride(dim);
  args.ignore_index = options.ignore_index;
  args.label_smoothing = options.label_smoothing;
  args.gamma = options.gamma;
  args.count_weights = options.count_weights;

  std::vector<int64_t> target_sizes;
  for (int64_t d = 0; d < logits.dim(); ++d)
    if (d != dim) target_sizes.push_back(logits.size(d));
  const bool index = target.scalar_type() == torch::headeronly::ScalarType::Long;
  if (index) {
    STD_TORCH_CHECK(target.numel() == args.positions, "target has ", target.numel(), " elements; input has ",
                    args.positions, " positions");
    if (!target.is_contiguous()) target = torch::stable::contiguous(target);
    args.index = static_cast<const int64_t*>(target.data_ptr());
  } else {
    STD_TORCH_CHECK(dtype_of(target, "target") == args.dtype, "target's dtype differs from input's");
    STD_TORCH_CHECK(target.dim() == logits.dim(), "target has ", target.dim(), " dimensions, input ", logits.dim());
    for (int64_t d = 0; d < logits.dim(); ++d)
      STD_TORCH_CHECK(target.size(d) == logits.size(d), "target has size ", target.size(d), " in dimension ", d,
                      ", input ", logits.size(d));
    args.probability = target.data_ptr();
    args.probability_class_stride = classes == 1 ? 1 : target.stride(dim);
  }
  if (options.weight) {
    const DType compute = args.dtype == DType::f64 ? DType::f64 : DType::f32;
    STD_TORCH_CHECK(dtype_of(*options.weight, "weight") == compute && options.weight->is_contiguous() &&
                        options.weight->numel() == classes,
                    "weight must be contiguous, of ", classes, " elements in the compute dtype");
    args.weight = options.weight->data_ptr();
  }
  Tensor upstream_rows = logits;  // keeps a contiguous copy alive
  args.grad_scale = 1;
  if (upstream) {
    if (none) {
      STD_TORCH_CHECK(upstream->numel() == args.positions && dtype_of(*upstream, "upstream") == args.dtype,
                      "the upstream gradient must have the loss's shape and dtype");
      upstream_rows = torch::stable::contiguous(*upstream);
      args.upstream = upstream_rows.data_ptr();
    } else {
      args.grad_scale = read_scalar(*upstream);
    }
  }
  OptionalTensor value;
  if (forward && none) {
    value = empty_contiguous(target_sizes, logits);
    args.value = value->data_ptr();
  }
  if (grad) {
    args.grad = grad->data_ptr();
    args.grad_class_stride = classes == 1 ? 1 : grad->stride(dim);
  }
  collapse(args, logits, grad, index ? nullptr : &target);

  const auto& kernels = cpu::kernels();
  double denominator = static_cast<double>(args.positions);
  if (index) {
    int64_t invalid = -1;
    denominator = parallel_sum(args.positions, 65536, [&](int64_t begin, int64_t end) {
      int64_t found = -1;
      const double counted = kernels.count_targets(args, begin, end, &found);
      if (found >= 0) invalid = found;  // any of them will do
      return counted;
    });
    if (invalid >= 0)
      throw std::out_of_range("Target " + std::to_string(args.index[invalid]) + " is out of bounds: input has " +
                              std::to_string(classes) + " classes, so target must be in [0, " +
                              std::to_string(classes - 1) + "] or ignore_index (" + std::to_string(args.ignore_index) +
                              ")");
  }
  if (options.reduction == Reduction::mean) args.grad_scale /= denominator;

  const bool rows = args.logits_class_stride == 1 && (!grad || args.grad_class_stride == 1) &&
                    (index || args.probability_class_stride == 1) && classes >= kShortRow;
  const auto kernel = rows ? kernels.softmax_rows : kernels.softmax_columns;
  // Multiples of every level's group of positions, so that only the last group is short.
  const int64_t chunk =
      rows ? std::max<int64_t>(1, kChunkElements / classes) : std::max<int64_t>(64, kChunkElements / classes / 64 * 64);
  const double sum =
      parallel_sum(args.positions, chunk, [&](int64_t begin, int64_t end) { return kernel(args, begin, end); });
  if (!forward) return *upstream;
  if (none) return *value;
  return scalar(options.reduction == Reduction::mean ? sum / denominator : sum, logits);
}

struct CrossEntropy {
  static Options options(const OptionalTensor& weight, int64_t reduction, int64_t ignore_index, double smoothing) {
    return {weight, ignore_index, smoothing, 0, true, static_cast<Reduction>(reduction)};
  }
};
struct SoftmaxFocal {
  static Options options(const OptionalTensor& alpha, int64_t reduction, int64_t ignore_index, double gamma) {
    return {alpha, ignore_index, 0, gamma, false, static_cast<Reduction>(reduction)};
  }
};

#define OPTION_PARAMETERS OptionalTensor weight, int64_t reduction, int64_t ignore_index, double parameter
#define OPTIONS Loss::options(weight, reduction, ignore_index, parameter)

template <class Loss>
Tensor forward(Tensor logits, Tensor target, OPTION_PARAMETERS) {
  return run(logits, target, OPTIONS, nullptr, nullptr);
}
template <class Loss>
std::tuple<Tensor, Tensor> train(Tensor logits, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(logits);
  Tensor value = run(logits, target, OPTIONS, nullptr, &grad);
  return {value, grad};
}
template <class Loss>
Tensor train_(Tensor logits, Tensor target, OPTION_PARAMETERS) {
  return run(logits, target, OPTIONS, nullptr, &logits);
}
template <class Loss>
Tensor backward(Tensor upstream, Tensor logits, Tensor target, OPTION_PARAMETERS) {
  Tensor grad = empty_in_order(logits);
  run(logits, target, OPTIONS, &upstream, &grad);
  return grad;
}
template <class Loss>
void backward_(Tensor upstream, Tensor logits, Tensor target, OPTION_PARAMETERS) {
  run(logits, target, OPTIONS, &upstream, &logits);
}

}  // namespace

#define FUSED_LOSSES_SOFTMAX(X)                                       \
  X(cross_entropy, CrossEntropy, "Tensor? weight", "label_smoothing") \
  X(softmax_focal, SoftmaxFocal, "Tensor? alpha", "gamma")

#define DEFINE_ONE(name, arguments, weight, parameter, result)                                              \
  m.def(name "(" arguments ", Tensor target, " weight ", int reduction, int ignore_index, float " parameter \
             ") -> " result);
#define DEFINE(name, loss, weight, parameter)                                                 \
  DEFINE_ONE(#name, "Tensor input", weight, parameter, "Tensor")                              \
  DEFINE_ONE(#name "_train", "Tensor input", weight, parameter, "(Tensor, Tensor)")           \
  DEFINE_ONE(#name "_train_", "Tensor(a!) input", weight, parameter, "Tensor")                \
  DEFINE_ONE(#name "_backward", "Tensor upstream, Tensor input", weight, parameter, "Tensor") \
  DEFINE_ONE(#name "_backward_", "Tensor upstream, Tensor(a!) input", weight, parameter, "()")
#define IMPLEMENT(name, loss, weight, parameter)         \
  m.impl(#name, TORCH_BOX(&forward<loss>));              \
  m.impl(#name "_train", TORCH_BOX(&train<loss>));       \
  m.impl(#name "_train_", TORCH_BOX(&train_<loss>));     \
  m.impl(#name "_backward", TORCH_BOX(&backward<loss>)); \
  m.impl(#name "_backward_", TORCH_BOX(&backward_<loss>));

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m){FUSED_LOSSES_SOFTMAX(DEFINE)} STABLE_TORCH_LIBRARY_IMPL(fused_losses,
                                                                                                       CPU, m) {
  FUSED_LOSSES_SOFTMAX(IMPLEMENT)
}

}  // namespace fused_losses
