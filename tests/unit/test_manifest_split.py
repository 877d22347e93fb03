"""No group, transcript, audio or recording is on both sides, and what is added moves nothing that it is not tied to."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.manifest.examine import Sound
from jobs.manifest.row import Row
from jobs.manifest.split import held_out
from jobs.manifest.store import Store, comparable

Claim = tuple[str, str, int, bool]
"""Group, text, audio and whether the clip is a part of a recording named by its audio."""

CLAIMS = st.lists(
    st.tuples(st.sampled_from(["", "g1", "g2", "g3", "g4"]), st.sampled_from([f"t{n}" for n in range(12)]),
              st.integers(0, 12), st.booleans()),
    min_size=1, max_size=40,
)  # fmt: skip


def sides_of(
    claims: list[Claim], ratio: float = 0.4, seed: int = 1, allowed: tuple[str, ...] = (), group: str | None = "speaker"
) -> list[int]:
    """The side of each clip."""
    with Store(group) as store:
        for number, (speaker, text, audio, part) in enumerate(claims):
            start_s = float(number) if part else None
            name = f"rec{audio}" if part else f"{number}.wav"
            row = Row(name, f"/data/{name}", text, "en", extras={"speaker": speaker}, start_s=start_s)
            store.add(row, Sound(1.0, 16_000, 1, 16_000, -20.0, f"{audio} {start_s}".encode()))
        return list(held_out(store, ratio, seed, allowed))[1:]


def values(claims: list[Claim], sides: list[int], key: Any) -> dict[int, set[Any]]:
    """What is on each side."""
    found: dict[int, set[Any]] = defaultdict(set)
    for claim, side in zip(claims, sides, strict=True):
        if (value := key(claim)) not in ("", None):
            found[side].add(value)
    return found


KEYS = {
    "group": lambda claim: claim[0],
    "transcript": lambda claim: claim[1],
    "audio": lambda claim: None if claim[3] else claim[2],
    "recording": lambda claim: claim[2] if claim[3] else None,
}


@given(CLAIMS, st.integers(0, 1000))
def test_nothing_is_on_both_sides(claims: list[Claim], seed: int) -> None:
    sides = sides_of(claims, seed=seed)
    for key in KEYS.values():
        found = values(claims, sides, key)
        assert not found[0] & found[1]


@given(CLAIMS, st.integers(0, 1000), st.sampled_from(["transcript", "audio", "recording"]))
def test_only_what_is_allowed_may_be_on_both_sides(claims: list[Claim], seed: int, allowed: str) -> None:
    sides = sides_of(claims, seed=seed, allowed=(allowed,))
    for name, key in KEYS.items():
        found = values(claims, sides, key)
        assert name == allowed or not found[0] & found[1]


@given(CLAIMS, CLAIMS)
def test_clips_that_are_tied_to_none_before_move_none(before: list[Claim], added: list[Claim]) -> None:
    fresh = [(f"x{group}" if group else "", f"new {text}", audio + 100, part) for group, text, audio, part in added]
    together = before + fresh
    assert sides_of(together)[: len(before)] == sides_of(before)


@given(CLAIMS, st.randoms())
def test_the_order_of_clips_makes_no_difference(claims: list[Claim], random: Any) -> None:
    claims = [(group, text, audio, False) for group, text, audio, _ in claims]
    order = list(range(len(claims)))
    random.shuffle(order)
    sides = sides_of(claims)
    shuffled = sides_of([claims[index] for index in order])
    assert [sides[index] for index in order] == shuffled


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.5])
def test_the_ratio_is_about_kept(ratio: float) -> None:
    claims: list[Claim] = [("", f"sentence {number}", number, False) for number in range(4000)]
    for seed in (1, 2, 3):
        assert sum(sides_of(claims, ratio, seed)) / 4000 == pytest.approx(ratio, abs=0.03)


def test_speakers_are_held_out_whole_although_their_sentences_differ() -> None:
    claims: list[Claim] = [(f"s{number % 50}", f"sentence {number}", number, False) for number in range(1000)]
    sides = sides_of(claims, 0.2)
    assert 0 < sum(sides) < 1000
    assert all(len({sides[number] for number in range(speaker, 1000, 50)}) == 1 for speaker in range(50))


def test_without_a_group_the_column_ties_nothing() -> None:
    claims: list[Claim] = [("eve", f"sentence {number}", number, False) for number in range(200)]
    assert len(set(sides_of(claims, group=None))) == 2
    assert len(set(sides_of(claims))) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("Turn it on!", "turn  it on"), ("ＡＢＣ", "abc"), ("straße", "STRASSE"), ("e\u0301t\u00e9", "\u00e9te\u0301")],
)
def test_transcripts_are_compared_without_case_and_punctuation(one: str, other: str) -> None:
    assert comparable(one) == comparable(other)


def test_texts_without_letters_and_in_other_scripts_stay_apart() -> None:
    texts = ["?!", "...", "नमस्ते", "नमसत", "你好", "你们好", "1", "2"]
    assert len({comparable(text) for text in texts}) == len(texts)
