"""The decoder's causal mask, for which nobody waits for a GPU.

transformers' decoder numbers the positions of its tokens, and whoever makes its mask looks whether they begin anew
within a row, as those of packed sequences do. What is seen is read from the GPU, which first has to come to it: past
the whole encoder. In a batch of ours each row is one text, whose positions never begin anew.

transformers has no argument for this, so that its function is wrapped, once. It does what it did but in `plain_rows`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from transformers.models.whisper import modeling_whisper

_PLAIN: ContextVar[bool] = ContextVar("plain_rows", default=False)
"""Of each thread: whether it is in `plain_rows`."""


@contextlib.contextmanager
def plain_rows() -> Iterator[None]:
    """Have decoders that this thread calls take each row for one text from its begin."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def _wrapped(create: Any) -> Any:
    @functools.wraps(create)
    def create_causal_mask(*args: Any, **kwargs: Any) -> Any:
        # Without positions nothing is looked for; they serve for nothing else there.
        return create(*args, **(kwargs | {"position_ids": None} if _PLAIN.get() else kwargs))

    return create_causal_mask


modeling_whisper.create_causal_mask = _wrapped(modeling_whisper.create_causal_mask)
