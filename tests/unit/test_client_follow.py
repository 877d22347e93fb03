"""Each line of a log is handed on once, however often and in whatever pieces it is read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.client.follow import Log

TEXT = "".join(f"line {number}\n" for number in range(12)) + "no end"
PIECES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
READINGS = st.lists(st.tuples(PIECES, st.booleans()), max_size=6)


@given(READINGS)
def test_a_log_that_is_read_from_its_begin_again_and_again_is_handed_on_once(
    readings: list[tuple[list[int], bool]],
) -> None:
    lines: list[str] = []
    log = Log(lines.append)
    for sizes, whole in readings:
        if whole:
            log.read_whole(TEXT[: sum(sizes) * 3] if len(TEXT[: sum(sizes) * 3]) >= log.seen else TEXT)
            continue
        reading, at = log.restart(), 0
        for size in sizes:
            reading.add(TEXT[at : at + size])
            at += size
        assert lines == TEXT.split("\n")[: len(lines)], "in order, none twice"
    log.read_whole(TEXT)
    log.finish()
    assert lines == TEXT.split("\n")


def test_a_log_that_has_become_shorter_is_another_one() -> None:
    lines: list[str] = []
    log = Log(lines.append)
    log.read_whole("one\ntwo\nthree\n")
    log.read_whole("four\n")
    assert lines == ["one", "two", "three", "four"]


def test_a_line_that_comes_in_two_pieces_is_one() -> None:
    lines: list[str] = []
    log = Log(lines.append)
    reading = log.restart()
    reading.add("a li")
    assert lines == []
    reading.add("ne\nanother")
    log.finish()
    assert lines == ["a line", "another"]
