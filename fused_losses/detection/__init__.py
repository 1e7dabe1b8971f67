"""What a detection head needs around its losses."""

from .pairwise import pairwise_bce_cost

__all__ = ["pairwise_bce_cost"]
