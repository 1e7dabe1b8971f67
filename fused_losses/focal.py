"""Focal losses: torchvision's on sigmoids, YOLOv5's wrapper around a criterion, and one on a softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from . import _checks, reference
from ._autograd import evaluate
from ._ops import LossOps


def _sigmoid_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    alpha_positive: float,
    alpha_negative: float,
    gamma: float,
    reduction: int,
) -> Tensor:
    name = _checks.REDUCTION_NAMES[reduction]
    return reference.sigmoid_focal_loss(
        input, target, weight, pos_weight, alpha_positive, alpha_negative, gamma, name
    )


def _softmax_reference(
    input: Tensor, target: Tensor, alpha: Tensor | None, reduction: int, ignore_index: int, gamma: float
) -> Tensor:
    return reference.softmax_focal_loss(
        input, target, alpha, gamma, ignore_index, _checks.REDUCTION_NAMES[reduction]
    )


_SIGMOID = LossOps.of("sigmoid_focal", _sigmoid_reference)
_SOFTMAX = LossOps.of("softmax_focal", _softmax_reference)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """Focal loss of independent sigmoids, with torchvision's signature.

    ::

        loss = a u^gamma ce,    ce = (1 - t) softplus(x) + t softplus(-x)
        u = s (1 - t) + (1 - s) t,    a = alpha t + (1 - alpha) (1 - t),    s = sigmoid(x)

    Equivalent to::

        s, ce = torch.sigmoid(inputs), BCEWithLogitsLoss(reduction="none")(inputs, targets)
        u = s * (1 - targets) + (1 - s) * targets
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * u**gamma * ce

    Args:
        inputs: logits, (*); float32, float64, bfloat16 or float16, any strides.
        targets: in [0, 1], soft or hard, the shape and dtype of inputs.
        alpha: weight of the positive targets, in [0, 1]; a negative one weighs nothing.
        gamma: how much a right prediction is discounted, >= 0; gradients are finite below 1 too.
        reduction: "none", "mean" or "sum".
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. The logits must
            not be used after this call; autograd raises if they are.

    Returns:
        The shape of inputs for "none", else (), in their dtype.

    Raises:
        ValueError: a shape, dtype, reduction or gamma that does not fit.
        TypeError: inputs or targets that are not tensors.

    Source: Lin et al. 2017, arXiv:1708.02002; torchvision.ops.sigmoid_focal_loss.
    """
    balance = (1.0, 1.0) if alpha < 0 else (alpha, 1 - alpha)
    return _sigmoid_focal(inputs, targets, None, None, *balance, gamma, reduction, inplace_backward)


def _sigmoid_focal(
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    alpha_positive: float,
    alpha_negative: float,
    gamma: float,
    reduction: str,
    inplace_backward: bool,
) -> Tensor:
    if _checks.plain(inputs, targets, weight, pos_weight):
        try:
            _require_gamma(gamma)
            code = _checks.REDUCTION_CODES[reduction]
            stored = code != _checks.NONE and inputs.dtype is not torch.float16
            tensors, focus = (targets, weight, pos_weight), (alpha_positive, alpha_negative, gamma, code)
            return evaluate(_SIGMOID, inplace_backward, stored, inputs, tensors, focus)
        except Exception:
            pass  # the checks below say why, or it happens again
    _checks.require_tensors("sigmoid_focal_loss", inputs=inputs, targets=targets)
    code = _checks.reduction_code(reduction)
    _require_gamma(gamma)
    if inputs.shape != targets.shape:
        raise ValueError(
            f"targets has {_checks.shape_of(targets)}; expected that of inputs, {tuple(inputs.shape)}"
        )
    others = {"targets": targets, "weight": weight, "pos_weight": pos_weight}
    options = (alpha_positive, alpha_negative, gamma)
    if not _checks.reachable(inputs, *others.values()) or _checks.elementwise_problem(inputs, **others):
        return reference.sigmoid_focal_loss(inputs, targets, weight, pos_weight, *options, reduction)
    stored = code != _checks.NONE and inputs.dtype != torch.float16
    return evaluate(
        _SIGMOID, inplace_backward, stored, inputs, (targets, weight, pos_weight), (*options, code)
    )


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """Focal loss of a softmax over the classes.

    ::

        loss = -alpha_y (1 - p_y)^gamma log p_y,    p = softmax(x)

    "mean" divides by the number of rows not ignored: alpha scales, it does not normalise.

    Equivalent to::

        log_p = torch.log_softmax(input, 1).gather(1, target[:, None])[:, 0]
        loss = -alpha[target] * (1 - log_p.exp()) ** gamma * log_p
        loss = loss.mean()

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ..., dK); float32, float64, bfloat16 or float16, any strides.
        target: class indices in [0, C), (), (N) or (N, d1, ..., dK), int64 or uint8.
        gamma: how much a right prediction is discounted, >= 0.
        alpha: a factor for every class, or (C), one for each.
        ignore_index: a target of this value has no loss and an exactly zero gradient.
        reduction: "none", "mean" or "sum".
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. The logits must
            not be used after this call; autograd raises if they are.

    Returns:
        The target's shape for "none", else (), in the input's dtype.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index.
        ValueError: a shape, dtype, reduction, alpha or gamma that does not fit.
        TypeError: input or target that is not a tensor.

    Source: Lin et al. 2017, arXiv:1708.02002, on a softmax.
    """
    if alpha is None and _checks.plain(input, target):
        try:
            _require_gamma(gamma)
            code = _checks.REDUCTION_CODES[reduction]
            stored = code != _checks.NONE and input.dtype is not torch.float16
            options = (code, ignore_index, gamma)
            return evaluate(_SOFTMAX, inplace_backward, stored, input, (target, None), options)
        except Exception:
            pass  # the checks below say why, or it happens again
    _checks.require_tensors("softmax_focal_loss", input=input, target=target)
    code = _checks.reduction_code(reduction)
    _require_gamma(gamma)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is {ignore_index!r}; expected an int")
    if input.dtype not in _checks.DTYPES:
        raise ValueError(f"input has dtype {input.dtype}; expected float32, float64, bfloat16 or float16")
    problem = _checks.index_problem(input, target)
    classes = 0 if problem else input.shape[min(input.dim() - 1, 1)]
    if isinstance(alpha, Tensor) and alpha.dim() > 0:
        if problem is None and tuple(alpha.shape) != (classes,):
            problem = f"alpha has {_checks.shape_of(alpha)}; expected ({classes},), one for each class"
    if problem is not None:
        raise ValueError(problem)
    weight = alpha if isinstance(alpha, Tensor) else None
    if not _checks.reachable(input, target, weight):
        return reference.softmax_focal_loss(input, target, alpha, gamma, ignore_index, reduction)
    if weight is not None and weight.dim() == 0:
        weight = weight.expand(classes)
    elif isinstance(alpha, (int, float)):
        weight = torch.full((classes,), float(alpha), dtype=input.dtype, device=input.device)
    if target.dtype == torch.uint8:
        target = target.long()
    weight = _checks.compute_weight(weight, input)
    stored = code != _checks.NONE and input.dtype != torch.float16
    options = (code, ignore_index, float(gamma))
    return evaluate(_SOFTMAX, inplace_backward, stored, input, (target, weight), options)


def _require_gamma(gamma: float) -> None:
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; expected a number >= 0")


class SigmoidFocalLoss(Module):
    """`fused_losses.functional.sigmoid_focal_loss` as a criterion."""

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.inplace_backward = inplace_backward

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return sigmoid_focal_loss(
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.reduction,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"


class SoftmaxFocalLoss(Module):
    """`fused_losses.functional.softmax_focal_loss` as a criterion; a tensor alpha is a buffer."""

    alpha: float | Tensor | None

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return softmax_focal_loss(
            input,
            target,
            self.gamma,
            self.alpha,
            self.ignore_index,
            self.reduction,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class FocalLoss(Module):
    """YOLOv5's focal loss around a binary cross entropy criterion, in one kernel.

    ::

        loss = a u^gamma ce,    ce: the wrapped criterion, element by element, with its weight and pos_weight
        u = s (1 - t) + (1 - s) t,    a = alpha t + (1 - alpha) (1 - t),    s = sigmoid(x)

    Equivalent to::

        ce = loss_fcn(pred, true)  # with reduction="none"
        p_t = true * pred.sigmoid() + (1 - true) * (1 - pred.sigmoid())
        loss = (true * alpha + (1 - true) * (1 - alpha)) * (1 - p_t) ** gamma * ce

    Args:
        loss_fcn: a BCEWithLogitsLoss, torch's or ours. Its reduction becomes this module's, and "none" its own,
            as in YOLOv5.
        gamma: how much a right prediction is discounted, >= 0.
        alpha: weight of the positive targets.

    Shapes: pred and true (*); the result is (*) for "none", else ().

    Raises:
        TypeError: loss_fcn is no BCEWithLogitsLoss.
        ValueError: as `fused_losses.functional.sigmoid_focal_loss`.

    Source: Lin et al. 2017, arXiv:1708.02002; YOLOv5's utils/loss.py.
    """

    def __init__(self, loss_fcn: torch.nn.BCEWithLogitsLoss, gamma: float = 2.0, alpha: float = 0.25) -> None:
        super().__init__()
        if not isinstance(loss_fcn, torch.nn.BCEWithLogitsLoss):
            raise TypeError(f"loss_fcn is {loss_fcn!r}; expected a BCEWithLogitsLoss")
        self.loss_fcn = loss_fcn
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = loss_fcn.reduction
        self.loss_fcn.reduction = "none"

    def forward(self, pred: Tensor, true: Tensor) -> Tensor:
        # YOLOv5 reduces for "mean" and "sum" and leaves anything else as it is.
        reduction = self.reduction if self.reduction in ("mean", "sum") else "none"
        return _sigmoid_focal(
            pred,
            true,
            self.loss_fcn.weight,
            self.loss_fcn.pos_weight,
            self.alpha,
            1 - self.alpha,
            self.gamma,
            reduction,
            bool(getattr(self.loss_fcn, "inplace_backward", False)),
        )

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, alpha={self.alpha}, reduction={self.reduction!r}"
