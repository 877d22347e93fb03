"""What to do where memory is short for all clips at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def in_halves(compute: Callable[[slice], T], clips: slice) -> list[T]:
    """All clips at once or, where memory is short, in halves; what was found of each part, in their order.

    Args:
        compute: takes some of the clips.
        clips: from where to where.

    Raises:
        torch.OutOfMemoryError: there is too little for one clip.
    """
    count = clips.stop - clips.start
    try:
        return [compute(clips)]
    except torch.OutOfMemoryError:
        if count == 1:
            raise
    torch.cuda.empty_cache()
    middle = clips.start + count // 2
    return in_halves(compute, slice(clips.start, middle)) + in_halves(compute, slice(middle, clips.stop))
