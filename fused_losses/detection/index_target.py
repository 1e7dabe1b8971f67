"""A class an anchor, in place of a dense target."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


@dataclass(frozen=True, eq=False)
class IndexTarget:
    """One class id an anchor, and one quality score if there is one, where a sigmoid loss takes a dense target.

    The dense target is never built, and a loss needs no memory of the logits' size but for their gradient.

    Equivalent to::

        target = torch.full_like(logits, negative)
        rows = (labels >= 0) & (labels < C)
        target[rows, labels[rows]] = positive if scores is None else scores[rows]

    Args:
        labels: class ids in [0, C), of any integer dtype; the shape of the logits without their class dimension.
            `background` and C stand for anchors without an object.
        scores: what the target is at the label, in place of `positive`: labels' shape, floating.
        positive: what the target is at the label.
        negative: what the target is everywhere else. 1 - e / 2 and e / 2 are YOLOv5's label smoothing.
        background: the label of an anchor without an object, besides C.
        ignore_index: the label of an anchor that does not count: its loss and its gradient are exactly 0, whatever
            its logits hold, and a mean leaves it out.

    Raises:
        TypeError: labels that are no tensor of integers, or scores that are none of floating point.
        ValueError: scores of another shape than labels.
        IndexError: from the loss, where a label is none of the above. On a GPU the kernel stops.
    """

    labels: Tensor
    scores: Tensor | None = None
    _: KW_ONLY
    positive: float = 1.0
    negative: float = 0.0
    background: int = -1
    ignore_index: int = -2

    def __post_init__(self) -> None:
        if not isinstance(self.labels, Tensor) or self.labels.dtype not in INTEGERS:
            raise TypeError(
                f"labels is {_kind(self.labels)}; expected a Tensor of integers, one class id an anchor"
            )
        if self.scores is None:
            return
        if not isinstance(self.scores, Tensor) or not self.scores.is_floating_point():
            raise TypeError(
                f"scores is {_kind(self.scores)}; expected a floating Tensor, one score an anchor"
            )
        if self.scores.shape != self.labels.shape:
            raise ValueError(
                f"scores has shape {tuple(self.scores.shape)}; expected that of labels, {tuple(self.labels.shape)}"
            )

    def dense(
        self, classes: int, class_dim: int = -1, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """The dense target and which of its elements count: what this object stands for, for a comparison.

        Returns:
            target and kept, the shape of labels with `classes` inserted at class_dim; kept is a bool.
        """
        from .. import reference

        if dtype is None:
            dtype = torch.get_default_dtype() if self.scores is None else self.scores.dtype
        dim = class_dim % (self.labels.dim() + 1)
        options = (self.positive, self.negative, self.background, self.ignore_index)
        target, ignored = reference.index_target(
            self.labels.long(), self.scores, classes, dim, *options, dtype
        )
        return target, ~ignored.unsqueeze(dim).expand_as(target)


def _kind(value: object) -> str:
    return f"a Tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)
