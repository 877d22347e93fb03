"""Words beside words: the alignment has the edits that the scores count, and nothing of either text is lost."""

from __future__ import annotations

import json

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import many_utterances, utterance

from jobs.evaluate import from_lines, to_lines
from jobs.score import Scorer
from service.report.align import NOTHING, SAME, align, columns, confusions
from service.report.lines import Line, join, plain, read_lines, short_names
from service.report.utterances import collect

TEXT = st.lists(st.sampled_from(["a", "b", "c", "the", "light"]), min_size=1, max_size=9)


def lines(*records: dict[str, object]) -> list[Line]:
    return read_lines("".join(json.dumps(record) + "\n" for record in records).encode())


@given(TEXT, TEXT)
def test_the_alignment_has_as_many_edits_of_each_kind_as_jiwer_counts(expected: list[str], heard: list[str]) -> None:
    found = align(expected, heard)
    counted = jiwer.process_words(" ".join(expected), " ".join(heard))
    pairs = list(zip(expected, found.words, strict=True))
    assert sum(other is not None and other != word for word, other in pairs) == counted.substitutions
    assert sum(other is None for _, other in pairs) == counted.deletions
    assert sum(map(len, found.inserted)) == counted.insertions


@given(TEXT, TEXT, TEXT)
def test_columns_hold_every_word_of_all_texts_in_order(expected: list[str], one: list[str], other: list[str]) -> None:
    made = columns(expected, [one, other])
    assert [column[0] for column in made if column[0] != NOTHING] == expected
    for index, side in enumerate((one, other), start=1):
        heard = [column[0] if column[index] == SAME else column[index] for column in made]
        assert [word for word in heard if word != NOTHING] == side


def test_insertions_of_two_models_at_one_place_share_columns() -> None:
    assert columns(["a", "b"], [["a", "x", "b"], ["a", "y", "z", "b"]]) == [
        ["a", 1, 1],
        [0, "x", "y"],
        [0, 0, "z"],
        ["b", 1, 1],
    ]


def test_confusions_are_counted_in_all_and_in_each_language() -> None:
    found = confusions(
        lines(
            utterance("a", "turn it on", "turn id on"),
            utterance("b", "it is late", "id is so late"),
            utterance("c", "la mesa verde", "la mesa", "es"),
        )
    )
    assert found[""].substituted == {("it", "id"): 2}
    assert found[""].deleted == {"verde": 1}
    assert found["en"].inserted == {"so": 1}
    assert found["es"].deleted == {"verde": 1}
    assert not found["en"].deleted


def test_what_is_stored_is_what_was_compared() -> None:
    """The page aligns the words that the score has counted, not the raw ones: "colour" is "color", "2" is "two"."""
    scorer = Scorer({"colour": "color"})
    row = {"path": "a.wav", "language": "en", "duration_s": 1.0, "text": "The colour, it's Mr. Green!"}
    scored = scorer.score(row, "the color it is mister green")
    assert scored.words.total == 0
    (line,) = read_lines(to_lines([scored]).encode())
    assert line.expected == line.heard == ["the", "color", "it", "is", "mister", "green"]
    assert line.is_exact
    assert from_lines(to_lines([scored])) == [scored]


def test_lines_of_an_earlier_version_are_read_and_said_to_be_inexact() -> None:
    record = utterance("a.wav", "Turn the light on.", "turn a light on")
    del record["compared_reference"], record["compared_hypothesis"]
    (line,) = lines(record)
    assert line.expected == ["turn", "the", "light", "on"]
    assert not line.is_exact
    assert not collect(["base"], [(line,)]).is_exact
    assert from_lines(json.dumps(record))[0].compared_reference is None


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [("Don't!", "en", "don t"), ("窓を開けて。", "ja", "窓 を 開 け て"), ("¿Qué?", "es", "qué")],
)
def test_the_simpler_normaliser_takes_case_and_punctuation_away(text: str, language: str, expected: str) -> None:
    assert plain(text, language) == expected


def test_clips_are_joined_by_name_and_reference_wherever_they_lay() -> None:
    one = lines(utterance("/one/a.wav", "x", "x"), utterance("/one/b.wav", "y", "y"), utterance("/one/a.wav", "z", "z"))
    other = lines(
        utterance("/two/a.wav", "z", "q"), utterance("/two/a.wav", "x", "p"), utterance("/two/c.wav", "w", "w")
    )
    assert [(first.heard, second.heard) for first, second in join([one, other])] == [(["z"], ["q"]), (["x"], ["p"])]


def test_clips_that_are_quite_alike_are_joined_in_their_order() -> None:
    one = lines(utterance("a.wav", "x", "first"), utterance("a.wav", "x", "second"))
    other = lines(utterance("a.wav", "x", "third"), utterance("a.wav", "x", "fourth"))
    joined = join([one, other])
    assert [(first.hypothesis, second.hypothesis) for first, second in joined] == [
        ("first", "third"),
        ("second", "fourth"),
    ]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/d/x/a.wav", "/d/y/b.wav"], ["x/a.wav", "y/b.wav"]),
        (["/d/a.wav"], ["a.wav"]),
        (["/d/a.wav", "e/b.wav"], ["/d/a.wav", "e/b.wav"]),
        (["s3://bucket/x/a.wav", "s3://bucket/x/b.wav"], ["a.wav", "b.wav"]),
    ],
)
def test_names_leave_out_the_folders_that_all_lie_in(paths: list[str], expected: list[str]) -> None:
    assert short_names(paths) == expected


def test_a_page_carries_the_worst_utterances_and_counts_all() -> None:
    clips = [(line,) for line in lines(*many_utterances(60))]
    found = collect(["model"], clips, most=10)
    assert (found.clips, found.shown) == (60, 10)
    carried = [clip["e"][0] for clip in found.content["clips"]]
    assert carried == sorted((one[0].errors for one in clips), reverse=True)[:10]
    all_of_them = confusions(one[0] for one in clips)[""].substituted.most_common(1)[0]
    assert found.content["confusions"][""]["substituted"][0] == [[*all_of_them[0]], [all_of_them[1]]]
