"""Trials in threads of one process, which meet at each step: what all of them want is computed as one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Wish = TypeVar("Wish")
Answer = TypeVar("Answer")


@dataclass
class _Asked(Generic[Wish, Answer]):
    wish: Wish
    answer: Answer | None = None
    error: BaseException | None = None
    done: bool = False


@dataclass
class Lockstep(Generic[Wish, Answer]):
    """Gathers one wish of each member and has them answered together.

    Attributes:
        compute: takes the members' wishes by their names and answers each, with an error where that is one's own.
    """

    compute: Callable[[dict[Any, Wish]], dict[Any, Answer | BaseException]]
    _turn: threading.Condition = field(default_factory=threading.Condition)
    _members: set[Any] = field(default_factory=set)
    _asked: dict[Any, _Asked[Wish, Answer]] = field(default_factory=dict)

    def join(self, member: Any) -> None:
        """Be waited for from now on: so those that come together go on together."""
        with self._turn:
            self._members.add(member)

    def between(self, change: Callable[[], None]) -> None:
        """Do something while nothing is computed."""
        with self._turn:
            change()

    def leave(self, member: Any, tidy: Callable[[], None] = lambda: None) -> None:
        """Be waited for no more."""
        with self._turn:
            if member in self._members:
                self._members.discard(member)
                try:
                    tidy()
                finally:
                    self._turn.notify_all()

    def ask(self, member: Any, wish: Wish) -> Answer:
        """Wait until all members have asked, and for the answer."""
        asked: _Asked[Wish, Answer] = _Asked(wish)
        with self._turn:
            self._asked[member] = asked
            while not asked.done:
                if self._asked.keys() >= self._members:
                    self._answer()
                else:
                    self._turn.wait()
        if asked.error is not None:
            raise asked.error
        return asked.answer  # type: ignore[return-value]

    def _answer(self) -> None:
        """Compute, in the thread of whoever asked last; the others wait."""
        everybody, self._asked = self._asked, {}
        try:
            found = self.compute({member: asked.wish for member, asked in everybody.items()})
        except BaseException as error:  # noqa: BLE001  # theirs as much as ours
            found = dict.fromkeys(everybody, error)
        for member, asked in everybody.items():
            answer = found[member]
            if isinstance(answer, BaseException):
                asked.error = answer
            else:
                asked.answer = answer
            asked.done = True
        self._turn.notify_all()
