"""Decoded clips kept in main memory: what is heard again is not decoded again.

What is kept are the samples that decoding gave, so whoever reads them gets the same bits as from the file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Decode = Callable[[], NDArray[np.float32]]
"""Reads a clip's samples (S,) from its file."""


class KeptAudio:
    """Clips of any number of splits, until there is no more room; threads may share it.

    Args:
        limit: bytes that it may take.
        spare: bytes that it may take now beside that; None: there is no other bound.
    """

    def __init__(self, limit: int, spare: Callable[[], int] | None = None) -> None:
        self.limit, self.bytes, self.turned_away = limit, 0, 0
        self._spare = spare
        self._clips: dict[tuple[str, int], NDArray[np.float32]] = {}
        self._lock = threading.Lock()

    def of(self, split: str) -> SplitAudio:
        """The clips of one split, by the name of its file."""
        return SplitAudio(self, split)

    @property
    def clips(self) -> int:
        """How many are kept."""
        return len(self._clips)

    def read(self, split: str, row: int, decode: Decode) -> NDArray[np.float32]:
        """A clip's samples (S,), not to be written to; decoded where they are not kept, and kept if there is room."""
        found = self._clips.get((split, row))
        if found is not None:
            return found
        samples_S = decode()  # two threads may do so for one clip; holding the lock, all would wait for each
        with self._lock:
            if (split, row) not in self._clips and self._has_room(samples_S.nbytes):
                samples_S.flags.writeable = False
                self.bytes += samples_S.nbytes
                self._clips[split, row] = samples_S
        return samples_S

    def _has_room(self, size: int) -> bool:
        has = self.bytes + size <= self.limit and (self._spare is None or size <= self._spare())
        self.turned_away += not has
        return has


class SplitAudio:
    """The clips of one split."""

    def __init__(self, audio: KeptAudio, split: str) -> None:
        self._audio, self._split = audio, split

    def read(self, row: int, decode: Decode) -> NDArray[np.float32]:
        """See KeptAudio."""
        return self._audio.read(self._split, row, decode)
