"""Objects that Ray Tune holds, and writes down with itself, but that live in this process alone."""

from __future__ import annotations

from typing import Any


class Here:
    """Is left out where it is pickled: what a search goes on from is its ledger. A copy of it is the object itself."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Here, ()

    def __deepcopy__(self, memo: Any) -> Here:
        return self
