"""The memory that large gradients on a CPU leave for the next call."""

from __future__ import annotations

from . import _C


def release_memory() -> None:
    """Give the memory kept for gradients back to the system.

    A gradient of 1 MB and more on a CPU (Linux) lies in memory that the library keeps when the gradient is freed: at
    most sixteen blocks, for the next gradients of about their size. The system clears new memory page by page, which takes
    longer than the loss. What is kept beyond 64 MB it may take back whenever it is short of memory, so there is no need to
    call this; until then it counts as resident. Gradients in use are not touched. A block is never larger than
    4 GiB, and the storage of such a gradient cannot be resized.
    """
    _C.release_kept_memory()
