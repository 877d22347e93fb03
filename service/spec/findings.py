"""What a check finds: a fault or a piece of advice, and the settings that it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from service.errors import Fault

NOTHING: Any = object()


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or probably not meant.

    Attributes:
        settings: paths of the settings that it rests on; first the one to change. A finding that rests on a setting
            with a fault of its own is not reported.
        value: what to show beside the message; left out where it would say nothing.
        fatal: a fault; else advice.
    """

    settings: tuple[str, ...]
    message: str
    value: Any = NOTHING
    fatal: bool = True

    def fault(self, where: str) -> Fault:
        """The finding as an entry of an error, by the name that its user knows the setting by."""
        return Fault(where, self.message) if self.value is NOTHING else Fault(where, self.message, self.value)


Findings = Iterator[Finding]


def advice(setting: str, message: str, value: Any = NOTHING) -> Finding:
    """A finding that stops nothing."""
    return Finding((setting,), message, value, fatal=False)
