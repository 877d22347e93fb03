"""What several trials need is made once, and no more of it kept than may be."""

from __future__ import annotations

import pytest

from jobs.search.shared.once import Once


def test_it_is_made_by_the_first_and_the_newest_are_kept() -> None:
    once: Once[str] = Once(2)
    made: list[str] = []
    for key in ("a", "a", "b", "c", "b", "a"):
        assert once.get(key, lambda key=key: made.append(key) or key) == key  # type: ignore[misc]
    assert made == ["a", "b", "c", "a"], "the oldest had gone"
    once.clear()
    assert len(once) == 0


def test_what_they_take_is_bounded_too() -> None:
    once: Once[bytes] = Once(64, 10, len)
    for key in range(6):
        once.get(key, lambda: bytes(3))
        assert len(once) == min(key + 1, 3)
    for key in range(6, 9):
        once.get(key, lambda: bytes(100))
    assert len(once) == 2, "of whatever size"


def test_what_failed_is_not_kept() -> None:
    once: Once[int] = Once(2)
    with pytest.raises(ZeroDivisionError):
        once.get("a", lambda: 1 // 0)
    assert once.get("a", lambda: 1) == 1
