"""What a frozen encoder makes of clips that are not varied: computed once, kept, and used again.

The reference is transformers' encoder, run anew for every batch. Here a row's output depends on the row alone, never on
the others of its batch or on whether it was kept: on the CPU each is computed by itself, since BLAS may round
differently for other shapes, and all are rounded to the dtype in which they are kept. So a run that is resumed, which
computes them anew, or one with no room for them, ends at the same bits. On a GPU the rows that are missing in a batch
are computed together, which is faster, and may differ by rounding.

The dtype is that of mixed precision: what autocast would make of them before cross-attention multiplies them. In a run
in float32 they stay in float32.

Legend: B clips, of which N are not kept; M mel bins, F frames of 10 ms, P positions of 20 ms (1500), D width.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.fast.places import DeviceMemory, Place

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By the precision that a run computes in."""

Encode = Callable[[Tensor], Tensor]
"""Features (N, M, F) on the device to the encoder's outputs (N, P, D)."""


@dataclass(frozen=True)
class Origin:
    """What the outputs depend on: whoever has the same may share them.

    Attributes:
        base: the base model.
        revision: its commit on the hub.
        attention: transformers' implementation.
        precision: `no`, `fp16` or `bf16`.
        device: kind of the device.
        splits: name and SHA-256 of each file of prepared rows.
    """

    base: str
    revision: str | None
    attention: str
    precision: str
    device: str
    splits: tuple[tuple[str, str], ...]


class EncoderOutputs:
    """Outputs of one encoder, by split and row, each in the first place that has room; threads may share it.

    Args:
        origin: what they depend on.
        device: where they are wanted.
        places: the fastest first; none: nothing is kept.
    """

    def __init__(self, origin: Origin, device: torch.device, places: list[Place]) -> None:
        self.origin, self.device, self.dtype = origin, device, DTYPES[origin.precision]
        self.places = places
        self._index: dict[tuple[str, int], tuple[Place, int]] = {}
        self._lock = threading.Lock()
        self._unreadable = ""

    def of(self, split: str, *, keep: bool = True) -> SplitOutputs:
        """The outputs of one split.

        Args:
            split: its name.
            keep: whether to keep those that are computed; what is kept already is used in any case.
        """
        if split not in dict(self.origin.splits):
            raise ValueError(f"these are outputs of {dict(self.origin.splits)}, and not of {split!r}")
        return SplitOutputs(self, split, keep)

    def settle(self) -> None:
        """Say that what else needs the device's memory has had its peak: outputs may take half of the rest."""
        for place in self.places:
            if isinstance(place, DeviceMemory):
                place.settle()

    def leave(self, needed: int) -> None:
        """Say how many bytes of the device's memory training may come to need."""
        for place in self.places:
            if isinstance(place, DeviceMemory):
                place.needed = max(place.needed, needed)

    @property
    def device_bytes(self) -> int:
        """What they have taken of the device's memory."""
        return sum(place.taken for place in self.places if isinstance(place, DeviceMemory))

    def rows(self) -> dict[str, int]:
        """How many rows of each split are kept."""
        return dict(Counter(split for split, _ in list(self._index)))

    def troubles(self) -> list[str]:
        """What has failed: places that could not be used, kept rows that could not be read."""
        return [text for text in (*(place.trouble for place in self.places), self._unreadable) if text]

    def find(self, split: str, row: int) -> Tensor | None:
        """A kept output (P, D), wherever it lies; None: it is not kept, or cannot be read any more."""
        entry = self._index.get((split, row))
        if entry is None:
            return None
        place, number = entry
        try:
            return place.get(number)
        except OSError as error:
            self._unreadable = str(error)
            self._index.pop((split, row), None)
            return None

    def keep(self, split: str, row: int, output_PD: Tensor) -> None:
        """Keep an output, if there is room."""
        with self._lock:
            if (split, row) in self._index:
                return
            for place in self.places:
                number = place.put(output_PD)
                if number is not None:
                    self._index[split, row] = (place, number)  # the last thing: others look without the lock
                    return


class SplitOutputs:
    """The outputs of one split's rows."""

    def __init__(self, outputs: EncoderOutputs, split: str, keep: bool) -> None:
        self.outputs, self._split, self._keep = outputs, split, keep

    def look_up(self, rows: list[int]) -> Heard:
        """Find what is kept of these rows; what lies on disk is read now."""
        return Heard(self, rows, [self.outputs.find(self._split, row) for row in rows])

    def complete(self, rows: list[int], found: list[Tensor | None], features_NMF: Tensor, encode: Encode) -> Tensor:
        """See Heard."""
        device, needed = self.outputs.device, [at for at, output in enumerate(found) if output is None]
        # Outputs computed in inference mode, or slabs made in it, could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            for at in needed:  # the same row may have been in the batch before
                found[at] = self.outputs.find(self._split, rows[at])
            missing = [(number, at) for number, at in enumerate(needed) if found[at] is None]
            for group in [missing] if device.type == "cuda" and missing else [[each] for each in missing]:
                features = features_NMF[[number for number, _ in group]].to(device, non_blocking=True)
                for (_, at), output_PD in zip(group, encode(features).to(self.outputs.dtype), strict=True):
                    found[at] = output_PD
                    if self._keep:
                        self.outputs.keep(self._split, rows[at], output_PD)
            return self._together([output_PD for output_PD in found if output_PD is not None])

    def _together(self, outputs: list[Tensor]) -> Tensor:
        shape = (len(outputs), *outputs[0].shape)
        together_BPD = torch.empty(shape, dtype=self.outputs.dtype, device=self.outputs.device)
        for into_PD, output_PD in zip(together_BPD, outputs, strict=True):
            into_PD.copy_(output_PD, non_blocking=True)
        return together_BPD


class Heard:
    """The rows of a batch and those outputs that were kept when they were looked up.

    Args:
        split: where they come from.
        rows: B rows.
        found: the output (P, D) of each; None: it is not kept.
    """

    def __init__(self, split: SplitOutputs, rows: list[int], found: list[Tensor | None]) -> None:
        self._split, self._rows, self._found = split, rows, found

    @property
    def missing(self) -> list[int]:
        """The N places in the batch whose features are needed."""
        return [at for at, output in enumerate(self._found) if output is None]

    def complete(self, features_NMF: Tensor, encode: Encode) -> Tensor:
        """All outputs (B, P, D) on the device; the missing ones are computed, and kept.

        Args:
            features_NMF: log-mel features of the missing rows, in their order.
            encode: the encoder.
        """
        return self._split.complete(self._rows, list(self._found), features_NMF, encode)
