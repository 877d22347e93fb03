"""Loops and senseless timestamps are seen, and speech that only repeats itself a little is not taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.guard.faults import BEYOND_S, MAX_COMPRESSION, compression, is_loop, timestamp_problem
from jobs.guard.hear import Piece

LOOPS = {
    "a word": ("light light light light light light light light", "en"),
    "a word after speech": (f"order the coffee please {'now ' * 8}", "en"),
    "a phrase": ("thank you thank you thank you thank you", "en"),
    "with capitals and marks": ("Thank you. Thank you! thank you, THANK YOU", "en"),
    "a sentence": ("I will be right back with the car. " * 4, "en"),
    "a sentence inside others": (f"First of all, {'we go home, ' * 4}and then to bed.", "en"),
    "a long sentence": (f"{' '.join(f'word{number}' for number in range(50))} " * 4, "en"),
    "syllables without spaces": ("ha" * 80, "en"),
    "marks alone": ("!" * 200, "en"),
    "one letter for ever": (f"so I said n{'o' * 300}", "en"),
    "characters": ("谢谢" * 8, "zh"),
    "characters with marks": ("ご視聴ありがとうございました。" * 4, "ja"),
    "cyrillic": ("спасибо большое " * 4, "ru"),
    "in the midst of much": (f"{Path(__file__).read_text()[300:1200]} {'and then ' * 8}", "en"),
    "near copies in a row": ("".join(f"I have {number} of them. " for number in range(1000, 1040)), "en"),
}

SPEECH = {
    "nothing": ("", "en"),
    "a word": ("yes", "en"),
    "some emphasis": ("no no no, that is very very very good", "en"),
    "a cheer": ("hip hip hooray hip hip hooray hip hip hooray", "en"),
    "three times": ("going once, going twice, going once, going twice, going once, going twice", "en"),
    "laughter": ("hahaha", "en"),
    "digits": ("my number is 0 6 1 1 1 1 2 2 2 2", "en"),
    "repeated apart": ("stop it now. " * 3 + "Look. " + "stop it now. " * 3, "en"),
    "japanese": ("はははは、そうですね。それはとてもいいと思います。", "ja"),
    "chinese": ("谢谢谢谢谢谢,今天天气很好,我们去公园散步吧。", "zh"),
    "thai": ("ขอบคุณมากมาก", "th"),
    "german": (
        "Der Hund, der den Mann, der die Frau, die das Kind gerufen hat, gesehen hat, gebissen hat, lief fort.", "de",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "language"), LOOPS.values(), ids=LOOPS)
def test_a_loop_is_seen(text: str, language: str) -> None:
    assert is_loop(text, language)


@pytest.mark.parametrize(("text", "language"), SPEECH.values(), ids=SPEECH)
def test_speech_is_no_loop(text: str, language: str) -> None:
    assert not is_loop(text, language)


def test_a_text_of_any_length_is_no_loop_and_one_loop_in_it_is_seen() -> None:
    changelog = (Path(__file__).parents[2] / "CHANGELOG.md").read_text("utf-8")
    long = changelog + changelog[::-1] + changelog
    assert len(long) > 5_000
    assert not is_loop(long, "en")
    assert is_loop(f"{long} {'again and ' * 30} {long}", "en")


def test_compression_is_that_of_the_worst_part_and_says_nothing_of_short_texts() -> None:
    plain = "The quick brown fox jumps over the lazy dog while nine wizards vex my bold quartz jury."
    assert compression("a" * 99) == 0.0
    assert compression("a" * 100) > MAX_COMPRESSION
    assert 0.8 < compression(f"{plain} {plain.upper()}") < 1.3
    assert compression(f"{plain}{'x' * 600}{plain}") > 5
    assert compression("ü" * 50) > MAX_COMPRESSION  # bytes count, not characters


@pytest.mark.parametrize("length", range(1, 9))
def test_a_phrase_loops_from_its_fourth_time_on_and_from_eight_words_on(length: int) -> None:
    words = list("abcdefgh"[:length]) * max(4, 8 // length)
    assert is_loop(" ".join(words), "en")
    assert not is_loop(" ".join(words[:-1]), "en")
    assert not is_loop(" ".join([*words[:-2], "x", words[-1]]), "en")


def pieces(*times: tuple[float, float | None]) -> list[Piece]:
    return [Piece(start_s, end_s, "word") for start_s, end_s in times]


@pytest.mark.parametrize(
    "times",
    [
        [],
        [(0.0, 1.0)],
        [(0.0, 1.0), (1.0, 5.0)],
        [(0.4, 1.0), (3.0, 5.0 + BEYOND_S)],
        [(0.0, 1.0), (0.96, 2.0)],
        [(2.0, 2.0)],
    ],
)
def test_timestamps_that_go_forward_within_the_clip_are_good(times: list[tuple[float, float | None]]) -> None:
    assert timestamp_problem(pieces(*times), 5.0) == ""


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([(0.0, 3.0), (2.0, 4.0)], "begins at 2.00 s, after one that goes to 3.00 s"),
        ([(0.0, 1.0), (2.0, 3.0), (0.5, 4.0)], "begins at 0.50 s, after one that goes to 3.00 s"),
        ([(3.0, 2.0)], "begins at 3.00 s and ends at 2.00 s"),
        ([(0.0, 6.02)], "a timestamp at 6.02 s, and the clip ends at 5.00 s"),
        ([(6.5, None)], "a timestamp at 6.50 s, and the clip ends at 5.00 s"),
        ([(0.0, None)], "the segment that begins at 0.00 s has no end"),
        ([(0.0, 1.0), (1.0, None)], "the segment that begins at 1.00 s has no end"),
        ([(0.0, None), (2.0, 3.0)], "the segment that begins at 0.00 s has no end"),
    ],
)
def test_timestamps_without_sense_are_named(times: list[tuple[float, float | None]], says: str) -> None:
    assert says in timestamp_problem(pieces(*times), 5.0)
