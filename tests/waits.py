"""Where the host would wait for a GPU, on a machine without one: the device `meta` stands for it."""

from __future__ import annotations

import math
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
_JOBS = str(Path(__file__).parents[1] / "jobs")


class Waits(TorchDispatchMode):
    """Notes every wait meanwhile. What is read of the device is zeros.

    Attributes:
        found: of each wait, what waited and for which line of ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            to, tensor = (kwargs.get("device"), args[0]) if name == "_to_copy" else (args[0].device, args[1])
            blocks = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if to is not None and torch.device(to).type != tensor.device.type:
                if blocks:
                    self._note(f"a copy from {tensor.device.type} to {torch.device(to).type}")
                if tensor.device == DEVICE:
                    return torch.zeros(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
        on_device = any(each.device == DEVICE for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        if on_device and name == "_local_scalar_dense":
            self._note("a number that is read")
            return 0
        if on_device and name == "nonzero":
            self._note("places that are counted")
            return torch.zeros(math.prod(args[0].shape), args[0].dim(), dtype=torch.long, device=DEVICE)
        if on_device and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(each is not None and (each.device != DEVICE or each.dtype == torch.bool) for each in args[1]):
                self._note("places that lie in main memory, or are to be counted")
                return args[0]
            if name != "index" and args[2].dim() == 0:
                # Of a CUDA tensor torch makes it in main memory, and copies it.
                self._note("a number that is put at places")
        return func(*args, **kwargs)

    def _note(self, what: str) -> None:
        ours = [each for each in traceback.extract_stack() if each.filename.startswith(_JOBS)]
        self.found.append(f"{what}, for {Path(ours[-1].filename).name}: {ours[-1].line}" if ours else what)


class MatrixCasts(TorchDispatchMode):
    """Counts casts of matrices from float32; activations have more dimensions.

    Attributes:
        count: how many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to = (kwargs or {}).get("dtype")
        if func.overloadpacket.__name__ == "_to_copy" and args[0].dim() == 2 and args[0].dtype == torch.float32:
            self.count += to in (torch.bfloat16, torch.float16)
        return func(*args, **(kwargs or {}))
