"""The losses of several feature levels, or of several decoder layers, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .index_target import IndexTarget

Level = tuple[Tensor, Tensor | IndexTarget]


def multi_level(
    loss: str | Callable[..., Tensor],
    levels: Sequence[Level],
    balance: Sequence[float] | None = None,
    *,
    each: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The sum of a loss over several levels, and its value at each.

    ::

        total = sum_i balance_i loss(logits_i, target_i)

    Every level is one pass of its loss over its logits; the host reads nothing back. Beside the losses it takes one
    operation for the values, one a level for the total, and one a level in backward; without a balance one for the
    total and none in backward.

    Equivalent to::

        values = [loss(logits, target, **options) for logits, target in levels]
        total = sum(factor * value for factor, value in zip(balance, values))
        per_level = torch.stack(values).detach()

    Args:
        loss: a criterion or function called with (logits, target), or the name of one in `fused_losses.functional`.
        levels: the (logits, target) pairs. A target is what the loss takes: dense or an IndexTarget.
        balance: a factor for each level, as YOLOv5's; 1 for all without it.
        each: options for each level, as weight or avg_factor.
        options: options for all levels.

    Returns:
        The total, (), and the values before the balance, (levels), detached.

    Raises:
        TypeError: a loss that returns something beside itself.
        ValueError: no level, another number of factors or options than of levels, a loss that is not reduced to one
            number, or no loss of that name.

    Source: the balance is that of YOLOv5's ComputeLoss.
    """
    function = _named(loss) if isinstance(loss, str) else loss
    pairs = list(levels)
    if not pairs:
        raise ValueError("levels is empty; expected a (logits, target) pair a level")
    for name, given in (("balance", balance), ("each", each)):
        if given is not None and len(given) != len(pairs):
            raise ValueError(f"{name} has {len(given)} elements; expected {len(pairs)}, one for each level")
    own = each if each is not None else [{}] * len(pairs)
    values = [function(*pair, **(options | more)) for pair, more in zip(pairs, own, strict=True)]
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the loss of a level is a {type(value).__name__}; expected a Tensor, and nothing beside it"
            )
        if value.dim() != 0:
            raise ValueError(
                f"the loss of a level has shape {tuple(value.shape)}; expected one number: reduction 'mean' or 'sum'"
            )
    stacked = torch.stack(values)
    if balance is None:
        return stacked.sum(), stacked.detach()
    total = values[0] * balance[0]
    for value, factor in zip(values[1:], balance[1:], strict=True):
        total = (
            total + value * factor if isinstance(factor, Tensor) else torch.add(total, value, alpha=factor)
        )
    return total, stacked.detach()


def _named(loss: str) -> Callable[..., Tensor]:
    from .. import functional

    if loss not in functional.__all__:
        raise ValueError(
            f"loss is {loss!r}; expected one of {', '.join(sorted(functional.__all__))}, or a callable"
        )
    function: Callable[..., Tensor] = getattr(functional, loss)
    return function
