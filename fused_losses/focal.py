"""Focal losses: torchvision's on sigmoids, YOLOv5's wrapper around a criterion, and one on a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from . import _checks, reference
from ._anchors import AvgFactor, anchor_ops, evaluate_anchors, of_classes
from ._autograd import evaluate, evaluate_eagerly
from ._ops import LossOps
from .bce import BCEWithLogitsLoss
from .detection.index_target import IndexTarget


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
_ANCHORS = anchor_ops("sigmoid_focal", reference.focal_elements)
_SOFTMAX = LossOps.of("softmax_focal", _softmax_reference)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor | IndexTarget,
    alpha: float | Tensor = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    avg_factor: AvgFactor = None,
    class_dim: int = -1,
    return_probabilities: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Focal loss of independent sigmoids, with torchvision's signature.

    ::

        loss = weight a u^gamma ce,    ce = (1 - t) softplus(x) + pos_weight t softplus(-x)
        u = s (1 - t) + (1 - s) t,    a = alpha t + (1 - alpha) (1 - t),    s = sigmoid(x)

    Equivalent to::

        s, ce = torch.sigmoid(inputs), BCEWithLogitsLoss(reduction="none")(inputs, targets)
        u = s * (1 - targets) + (1 - s) * targets
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * u**gamma * ce

    Args:
        inputs: logits, (*); float32, float64, bfloat16 or float16, any strides.
        targets: in [0, 1], soft or hard, the shape and dtype of inputs; or an IndexTarget, one class an anchor.
        alpha: weight of the positive targets, in [0, 1], or (C), one for each class; a negative number weighs nothing.
        gamma: how much a right prediction is discounted, >= 0; gradients are finite below 1 too.
        reduction: "none", "mean" or "sum".
        weight: a factor for each element; broadcasts to the shape of inputs. With an IndexTarget one of the labels'
            shape is a factor for each anchor, and beside labels (N) one for each class is (1, C).
        pos_weight: a factor for each positive target; broadcasts to the shape of inputs.
        avg_factor: "mean" divides the sum by this number, or 0-dim tensor, but at least by 1; the host reads
            nothing. Without it "mean" divides by the elements, of anchors not ignored.
        class_dim: where the classes stand: 1 for (B, C, A) and (B, C, H, W).
        return_probabilities: return (loss, sigmoid(inputs)) from the same read, the latter detached.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. The logits must
            not be used after this call, nor read: autograd raises for what goes through a backward pass alone.

    Returns:
        The shape of inputs for "none", else (), in their dtype.

    Raises:
        ValueError: a shape, dtype, reduction, gamma or avg_factor that does not fit.
        TypeError: inputs or targets that are not tensors.
        IndexError: a label that is no class, nor background nor ignored.

    Source: Lin et al. 2017, arXiv:1708.02002; torchvision.ops.sigmoid_focal_loss.
    """
    per_class = alpha if isinstance(alpha, Tensor) else None
    if per_class is None:
        _checks.require_number("alpha", alpha)
    if isinstance(alpha, Tensor) or alpha < 0:
        balance = (1.0, 1.0)
    else:
        balance = (alpha, 1 - alpha)
    if (
        isinstance(targets, IndexTarget)
        or per_class is not None
        or avg_factor is not None
        or class_dim != -1
        or return_probabilities
    ):
        _checks.require_exponent("gamma", gamma)
        return evaluate_anchors(
            _ANCHORS,
            inputs,
            targets,
            weight=weight,
            pos_weight=pos_weight,
            alpha=per_class,
            alpha_positive=balance[0],
            alpha_negative=balance[1],
            gamma=gamma,
            avg_factor=avg_factor,
            class_dim=class_dim,
            reduction=reduction,
            inplace_backward=inplace_backward,
            return_probabilities=return_probabilities,
        )
    return _sigmoid_focal(inputs, targets, weight, pos_weight, *balance, gamma, reduction, inplace_backward)


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
    plain = _checks.plain(inputs, targets, weight, pos_weight)
    ops = _SIGMOID if plain else _checks.autocast_ops(_SIGMOID, inputs, targets, weight, pos_weight)
    if ops is not None:
        try:
            _checks.require_exponent("gamma", gamma)
            code = _checks.REDUCTION_CODES[reduction]
            stored = code != _checks.NONE and inputs.dtype is not torch.float16
            tensors, focus = (targets, weight, pos_weight), (alpha_positive, alpha_negative, gamma, code)
            return evaluate_eagerly(ops, inplace_backward, stored, inputs, tensors, focus)
        except _checks.OBJECTIONS as error:
            _checks.pass_on(error)  # of the op's own the checks below say why, or they happen again
    _checks.require_tensors("sigmoid_focal_loss", inputs=inputs, targets=targets)
    code = _checks.reduction_code(reduction)
    _checks.require_exponent("gamma", gamma)
    if inputs.shape != targets.shape:
        raise ValueError(
            f"targets has {_checks.shape_of(targets)}; expected that of inputs, {tuple(inputs.shape)}"
        )
    others = {"targets": targets, "weight": weight, "pos_weight": pos_weight}
    options = (alpha_positive, alpha_negative, gamma)
    ops = _checks.traced_ops(_SIGMOID, inputs)
    if not _checks.reachable(inputs, *others.values(), ops=ops) or not _checks.fits(inputs, **others):
        return reference.sigmoid_focal_loss(
            _checks.autocast(inputs), targets, weight, pos_weight, *options, reduction
        )
    stored = code != _checks.NONE and inputs.dtype != torch.float16
    return evaluate(ops, inplace_backward, stored, inputs, (targets, weight, pos_weight), (*options, code))


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
            not be used after this call, nor read: autograd raises for what goes through a backward pass alone.

    Returns:
        The target's shape for "none", else (), in the input's dtype.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index.
        ValueError: a shape, dtype, reduction, alpha or gamma that does not fit.
        TypeError: input or target that is not a tensor.

    Source: Lin et al. 2017, arXiv:1708.02002, on a softmax.
    """
    weight = alpha if isinstance(alpha, Tensor) else None
    plain = _checks.plain(input, target, weight)
    ops = _SOFTMAX if plain else _checks.autocast_ops(_SOFTMAX, input, target, weight)
    if ops is not None:
        try:
            _checks.require_exponent("gamma", gamma)
            code = _checks.REDUCTION_CODES[reduction]
            stored = code != _checks.NONE and input.dtype is not torch.float16
            tensors, options = (target, _per_class(alpha, input)), (code, ignore_index, gamma)
            return evaluate_eagerly(ops, inplace_backward, stored, input, tensors, options)
        except _checks.OBJECTIONS as error:
            _checks.pass_on(error)  # of the op's own the checks below say why, or they happen again
    _checks.require_tensors("softmax_focal_loss", input=input, target=target)
    code = _checks.reduction_code(reduction)
    _checks.require_exponent("gamma", gamma)
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
    ops = _checks.traced_ops(_SOFTMAX, input)
    if not _checks.reachable(input, target, weight, ops=ops):
        return reference.softmax_focal_loss(
            _checks.autocast(input), target, alpha, gamma, ignore_index, reduction
        )
    if target.dtype == torch.uint8:
        target = target.long()
    weight = _per_class(alpha, input)
    stored = code != _checks.NONE and input.dtype != torch.float16
    options = (code, ignore_index, float(gamma))
    return evaluate(ops, inplace_backward, stored, input, (target, weight), options)


def _per_class(alpha: float | Tensor | None, input: Tensor) -> Tensor | None:
    """alpha as the kernels read it: one for each class, (C), in the dtype of the arithmetic."""
    if alpha is None:
        return None
    if not isinstance(alpha, Tensor):
        _checks.require_number("alpha", alpha)
        wide = torch.float64 if input.dtype is torch.float64 else torch.float32
        alpha = torch.full((), float(alpha), dtype=wide, device=input.device)
    if alpha.dim() == 0:
        alpha = alpha.expand(input.shape[min(input.dim() - 1, 1)])
    return _checks.compute_weight(alpha, input)


class SigmoidFocalLoss(Module):
    """`fused_losses.functional.sigmoid_focal_loss` as a criterion; a tensor alpha is a buffer."""

    alpha: float | Tensor

    def __init__(
        self,
        alpha: float | Tensor = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        class_dim: int = -1,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.class_dim = class_dim
        self.inplace_backward = inplace_backward

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | IndexTarget,
        weight: Tensor | None = None,
        *,
        avg_factor: AvgFactor = None,
    ) -> Tensor:
        loss: Tensor = sigmoid_focal_loss(
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.reduction,
            weight=weight,
            avg_factor=avg_factor,
            class_dim=self.class_dim,
            inplace_backward=self.inplace_backward,
        )
        return loss

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
        return (
            f"gamma={self.gamma}, alpha={self.alpha}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )


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
            as in YOLOv5. One with a forward or hooks of its own is called, and what is around it is plain torch.
        gamma: how much a right prediction is discounted, >= 0.
        alpha: weight of the positive targets, or (C), one for each class.

    Shapes: pred and true (*), or true an IndexTarget; the result is (*) for "none", else ().

    Raises:
        TypeError: loss_fcn is no BCEWithLogitsLoss; or it has a forward of its own, and true is an IndexTarget, or
            avg_factor is given.
        ValueError: as `fused_losses.functional.sigmoid_focal_loss`.

    Source: Lin et al. 2017, arXiv:1708.02002; YOLOv5's utils/loss.py.
    """

    def __init__(
        self, loss_fcn: torch.nn.BCEWithLogitsLoss, gamma: float = 2.0, alpha: float | Tensor = 0.25
    ) -> None:
        super().__init__()
        if not isinstance(loss_fcn, torch.nn.BCEWithLogitsLoss):
            raise TypeError(f"loss_fcn is {loss_fcn!r}; expected a BCEWithLogitsLoss")
        self.loss_fcn = loss_fcn
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = loss_fcn.reduction
        self.loss_fcn.reduction = "none"

    def forward(self, pred: Tensor, true: Tensor | IndexTarget, *, avg_factor: AvgFactor = None) -> Tensor:
        # YOLOv5 reduces for "mean" and "sum" and leaves anything else as it is.
        reduction = self.reduction if self.reduction in ("mean", "sum") else "none"
        if not wraps_plain_bce(self):
            if isinstance(true, IndexTarget) or avg_factor is not None:
                raise TypeError(
                    f"loss_fcn, {self.loss_fcn!r}, has a forward, hooks or a reduction of its own: it takes no IndexTarget "
                    "and no avg_factor"
                )
            return _around(self.loss_fcn(pred, true), pred, true, self.alpha, self.gamma, reduction)
        weight, pos_weight = self.loss_fcn.weight, self.loss_fcn.pos_weight
        inplace_backward = bool(getattr(self.loss_fcn, "inplace_backward", False))
        class_dim = getattr(self.loss_fcn, "class_dim", -1)
        loss: Tensor
        if isinstance(self.alpha, Tensor):
            loss = sigmoid_focal_loss(
                pred,
                true,
                self.alpha,
                self.gamma,
                reduction,
                weight=of_classes(weight, true, class_dim),
                pos_weight=pos_weight,
                avg_factor=avg_factor,
                class_dim=class_dim,
                inplace_backward=inplace_backward,
            )
            return loss
        balance = (self.alpha, 1 - self.alpha)
        if not isinstance(true, IndexTarget) and avg_factor is None and class_dim == -1:
            return _sigmoid_focal(
                pred, true, weight, pos_weight, *balance, self.gamma, reduction, inplace_backward
            )
        _checks.require_exponent("gamma", self.gamma)
        loss = evaluate_anchors(
            _ANCHORS,
            pred,
            true,
            weight=of_classes(weight, true, class_dim),
            pos_weight=pos_weight,
            alpha_positive=balance[0],
            alpha_negative=balance[1],
            gamma=self.gamma,
            avg_factor=avg_factor,
            class_dim=class_dim,
            reduction=reduction,
            inplace_backward=inplace_backward,
            return_probabilities=False,
        )
        return loss

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, alpha={self.alpha}, reduction={self.reduction!r}"


def wraps_plain_bce(criterion: Any) -> bool:
    """Whether the wrapped criterion does what its class does, and nothing would notice that it is not called."""
    bce = criterion.loss_fcn
    return (
        type(bce).forward in (torch.nn.BCEWithLogitsLoss.forward, BCEWithLogitsLoss.forward)
        and type(bce).__call__ is Module.__call__
        and bce.reduction == "none"
        and not (bce._forward_hooks or bce._forward_pre_hooks or bce._backward_hooks)
        and not bce._backward_pre_hooks
        and "forward" not in vars(bce)
    )


def _around(
    ce: Tensor, pred: Tensor, true: Tensor, alpha: float | Tensor, gamma: float, reduction: str
) -> Tensor:
    """What YOLOv5 does with the result of the criterion it wraps."""
    s = pred.sigmoid()
    u = true * (1 - s) + (1 - true) * s
    loss = (true * alpha + (1 - true) * (1 - alpha)) * u**gamma * ce
    return reference.reduce(loss, reduction)
