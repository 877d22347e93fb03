"""Error rates are jiwer's over texts as Whisper's authors normalise them, with the edits behind them."""

from __future__ import annotations

import json
import random
from typing import Any

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from jobs.evaluate import from_lines, to_lines
from jobs.score import Errors, Scorer, Utterance, character_errors, summarise, word_errors
from service.spec.job import JobSpec
from service.spec.languages import WITHOUT_SPACES

WORDS = ["open", "close", "the", "window", "door", "now", "please", "a", "it's"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


@pytest.fixture(scope="module")
def scorer(processor: Any) -> Scorer:
    return Scorer(processor.tokenizer.english_spelling_normalizer)


def record(text: str, language: str = "en", duration_s: float = 1.0) -> dict[str, Any]:
    return {"path": "a.wav", "text": text, "language": language, "duration_s": duration_s}


def corpus(size: int, seed: int = 0) -> list[tuple[str, str]]:
    """References, and hypotheses with some words changed, left out and put in."""
    generator = random.Random(seed)
    pairs = []
    for _ in range(size):
        words = generator.choices(WORDS, k=generator.randint(1, 12))
        heard = [generator.choice(WORDS) if generator.random() < 0.2 else word for word in words]
        heard = [word for word in heard if generator.random() > 0.1]
        heard += generator.choices(WORDS, k=generator.randint(0, 2))
        pairs.append((" ".join(words), " ".join(heard)))
    return pairs


def test_rates_of_a_corpus_are_jiwers(scorer: Scorer) -> None:
    pairs = corpus(200)
    summary = summarise([scorer.score(record(reference), heard) for reference, heard in pairs], bootstrap=0)
    references, hypotheses = map(list, zip(*pairs, strict=True))
    expected = jiwer.process_words(references, hypotheses)
    assert summary["wer_raw"] == pytest.approx(expected.wer, rel=1e-12)
    assert summary["cer_raw"] == pytest.approx(jiwer.cer(references, hypotheses), rel=1e-12)
    normalised = [[scorer.normalise(text, "en") for text in texts] for texts in (references, hypotheses)]
    found = jiwer.process_words(*normalised)
    assert summary["wer"] == pytest.approx(found.wer, rel=1e-12)
    assert summary["cer"] == pytest.approx(jiwer.cer(*normalised), rel=1e-12)
    counts = [summary[name] for name in ("substitutions", "deletions", "insertions")]
    assert counts == [found.substitutions, found.deletions, found.insertions]
    assert summary["words"] == found.hits + found.substitutions + found.deletions
    assert summary["utterances"] == 200
    assert min(counts) > 20, "the corpus has errors of every kind"


def test_rates_are_over_the_corpus_and_no_mean_of_rates(scorer: Scorer) -> None:
    pairs = [
        ("open", "close"),
        ("the door now please open it the window now", "the door now please open it the window now"),
    ]
    assert summarise([scorer.score(record(*pair[:1]), pair[1]) for pair in pairs], bootstrap=0)["wer_raw"] == 0.1


@pytest.mark.parametrize(
    ("reference", "heard", "expected"),
    [
        ("open the door", "open the door", Errors(0, 0, 0, 3)),
        ("open the door", "close the door", Errors(1, 0, 0, 3)),
        ("open the door", "open door", Errors(0, 1, 0, 3)),
        ("open the door", "open the the door", Errors(0, 0, 1, 3)),
        ("open the door", "", Errors(0, 3, 0, 3)),
        ("", "open it", Errors(0, 0, 2, 0)),
        ("", "", Errors(0, 0, 0, 0)),
        (" open\nthe\tdoor ", "open the\u00a0door", Errors(0, 0, 0, 3)),
    ],
)
def test_edits_are_told_apart(reference: str, heard: str, expected: Errors) -> None:
    assert word_errors(reference, heard) == expected


@given(TEXTS, TEXTS)
def test_edits_turn_one_text_into_the_other(reference: str, heard: str) -> None:
    for errors, expected, found in (
        (word_errors(reference, heard), len(reference.split()), len(heard.split())),
        (character_errors(reference, heard), len(reference), len(heard)),
    ):
        assert errors.length == expected
        assert errors.length - errors.deletions + errors.insertions == found
        assert (errors.total == 0) == (reference == heard)


@given(st.text(max_size=30), st.text(max_size=30), st.sampled_from(["en", "es", "zh", "th", "hi", "ar"]))
def test_no_text_is_beyond_scoring(scorer: Scorer, reference: str, heard: str, language: str) -> None:
    utterance = scorer.score(record(reference.strip(), language), heard.strip())
    for errors in (utterance.words, utterance.words_raw, utterance.characters, utterance.characters_raw):
        assert errors.length - errors.deletions + errors.insertions >= 0
    assert scorer.score(record(reference.strip(), language), reference.strip()).words_raw.total == 0


def test_an_empty_reference_costs_one_only_where_something_was_heard() -> None:
    assert Errors(0, 0, 0, 0).rate == 0
    assert Errors(0, 0, 3, 0).rate == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The colour, please!", "the color please"),
        ("I'm twenty-one", "i am 21"),
        ("Mr. Smith won't", "mister smith will not"),
        ("$20 million", "twenty million dollars"),
        ("um, open [noise] it (door)", "open it"),
    ],
)
def test_english_is_normalised_as_whispers_authors_do(scorer: Scorer, one: str, other: str) -> None:
    assert scorer.normalise(one, "en") == scorer.normalise(other, "en") != ""
    utterance = scorer.score(record(one), other)
    assert utterance.words.total == 0
    assert utterance.words_raw.total > 0


@pytest.mark.parametrize(
    ("language", "reference", "heard", "wrong", "of"),
    [
        ("hi", "हिन्दी में किताब पढ़ो", "हिन्दी में किताब पढ़ो।", 0, 4),
        ("hi", "किताब की", "कातिब का", 2, 2),
        ("bn", "আমি বই পড়ি", "আমি বই পড়ি", 0, 3),
        ("ta", "அவள் படிக்கிறாள்", "அவள் படிக்கிறான்", 1, 2),
        ("ar", "كَتَبَ الوَلَدُ", "كَتَبَ الوَلَدُ", 0, 2),
        ("fr", "L'été, déjà", "l été deja", 1, 3),
    ],
)
def test_marks_are_part_of_words(
    scorer: Scorer, language: str, reference: str, heard: str, wrong: int, of: int
) -> None:
    words = scorer.score(record(reference, language), heard).words
    assert (words.total, words.length) == (wrong, of)


@pytest.mark.setting("evaluation.normalizer")
def test_the_published_normaliser_takes_marks_for_gaps(processor: Any) -> None:
    spelling = processor.tokenizer.english_spelling_normalizer
    theirs, ours = Scorer(spelling, normaliser="whisper"), Scorer(spelling)
    assert theirs.normalise("किताब की", "hi") == BasicTextNormalizer()("किताब की").strip() == "क त ब क"
    assert ours.normalise("किताब की", "hi") == "किताब की"
    blind = theirs.score(record("किताब की", "hi"), "कातिब का")
    assert blind.words.total == 0
    assert theirs.normalise("ที่นี่", "th") != ours.normalise("ที่นี่", "th") == "ที่ นี่"
    same = [("¿Qué  hora es, Señor?", "es"), ("L'été!", "fr"), ("(mm) It's 5 o'clock", "en"), ("你好。", "zh")]
    for text, language in same:
        assert theirs.normalise(text, language) == ours.normalise(text, language), "where no marks are written apart"


def test_a_spec_says_by_which(processor: Any) -> None:
    for normaliser, words in (("keep_marks", 1), ("whisper", 3)):
        scorer = Scorer.of(JobSpec.model_validate({"evaluation": {"normalizer": normaliser}}), processor)
        assert scorer.score(record("किताब", "hi"), "किताब").words.length == words
        assert scorer.normalise("The colour", "en") == "the color"


def test_other_languages_lose_case_and_punctuation_but_no_words(scorer: Scorer) -> None:
    assert scorer.normalise("¿Qué  hora es, Señor?", "es") == "qué hora es señor"
    assert scorer.normalise("Ich bin um einundzwanzig Uhr da.", "de") == "ich bin um einundzwanzig uhr da"
    assert scorer.normalise("colour", "de") == "colour", "English spellings stay out of other languages"


def test_marks_that_make_another_letter_are_kept_by_no_normaliser_but_in_their_place(scorer: Scorer) -> None:
    # BasicTextNormalizer turns marks into spaces, as Whisper's own does; both sides are treated alike.
    assert scorer.score(record("नमस्ते दुनिया", "hi"), "नमस्ते दुनिया").words.total == 0


@pytest.mark.parametrize("language", sorted(WITHOUT_SPACES))
def test_languages_without_spaces_are_scored_letter_by_letter(scorer: Scorer, language: str) -> None:
    assert scorer.normalise("你好，世界。", language) == "你 好 世 界"
    utterance = scorer.score(record("你好世界", language), "你好地界")
    assert utterance.words == Errors(1, 0, 0, 4)
    assert utterance.words_raw == Errors(1, 0, 0, 1)


def utterances(scorer: Scorer) -> list[Utterance]:
    languages = ("en", "es", "de")
    return [scorer.score(record(*pair[:1], languages[i % 3]), pair[1]) for i, pair in enumerate(corpus(90, seed=1))]


def test_totals_are_the_sums_over_languages(scorer: Scorer) -> None:
    summary = summarise(utterances(scorer), bootstrap=0)
    assert sorted(summary["languages"]) == ["de", "en", "es"]
    for name in ("utterances", "words", "substitutions", "deletions", "insertions"):
        assert sum(values[name] for values in summary["languages"].values()) == summary[name] > 0
    parts = summary["languages"].values()
    assert sum(part["wer"] * part["words"] for part in parts) == pytest.approx(summary["wer"] * summary["words"])


def test_the_interval_holds_the_estimate_and_is_the_same_each_time(scorer: Scorer) -> None:
    everything = utterances(scorer)
    one, again = (summarise(everything, bootstrap=500) for _ in range(2))
    low, high = one["wer_interval"]
    assert low < one["wer"] < high
    assert one == again
    assert summarise(everything, bootstrap=500, seed=1)["wer_interval"] != one["wer_interval"]
    assert "wer_interval" not in summarise(everything, bootstrap=0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    # Utterances of 5 words whose errors are drawn at a known rate: 95 % of the intervals hold it.
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        errors = [Errors(int(edits), 0, 0, 5) for edits in generator.binomial(5, 0.2, size=60)]
        lines = [Utterance("a", "en", 1.0, "", "", one, one, one, one) for one in errors]
        low, high = summarise(lines, bootstrap=200, seed=trial)["wer_interval"]
        held += low <= 0.2 <= high
    assert 180 <= held <= 199


def test_one_utterance_has_an_interval_of_no_width(scorer: Scorer) -> None:
    summary = summarise([scorer.score(record("open the door"), "open door")])
    assert summary["wer_interval"] == [summary["wer"]] * 2


def test_utterances_come_back_from_their_lines(scorer: Scorer) -> None:
    kept = [*utterances(scorer), scorer.score(record('a "b"\u2028c', "es"), "ñ")]
    lines = to_lines(kept)
    assert from_lines(lines) == kept
    assert len(lines.split("\n")) == len(kept) + 1
    assert json.loads(lines.split("\n")[0])["wer"] == kept[0].words.rate
