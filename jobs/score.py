"""Word and character error rates of transcripts, with the errors behind them and an interval around them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jiwer
import numpy as np
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from jobs.text import TextNormaliser
from service.spec.job import JobSpec
from service.spec.languages import WITHOUT_SPACES
from service.spec.text import TextRules

Normaliser = Literal["keep_marks", "whisper"]


@dataclass(frozen=True)
class Errors:
    """Edits that turn a hypothesis into its reference, and the reference's length, in words or characters."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    length: int = 0

    @property
    def total(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.length + other.length,
        )

    @property
    def rate(self) -> float:
        """Edits per reference word or character. A reference without any has rate 0 where nothing was heard, else 1."""
        return self.total / self.length if self.length else float(self.total > 0)


@dataclass(frozen=True)
class Utterance:
    """One row's reference and hypothesis, and what lies between them.

    `compared_reference` and `compared_hypothesis` are the texts whose words are counted, after the normaliser: the
    report aligns them, where no normaliser is at hand. None: of a run by an earlier version.
    """

    path: str
    language: str
    duration_s: float
    reference: str
    hypothesis: str
    words: Errors
    words_raw: Errors
    characters: Errors
    characters_raw: Errors
    compared_reference: str | None = None
    compared_hypothesis: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """A line of the utterances' file."""
        return asdict(self) | {"wer": self.words.rate}

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> Utterance:
        """Inverse of `as_dict`."""
        plain: dict[str, Any] = {
            key: line[key] for key in ("path", "language", "duration_s", "reference", "hypothesis")
        }
        for key in ("words", "words_raw", "characters", "characters_raw"):
            plain[key] = Errors(**line[key])
        for key in ("compared_reference", "compared_hypothesis"):
            plain[key] = line.get(key)
        return cls(**plain)


class Scorer:
    """Scores transcripts as Whisper's authors do: their English normaliser for English, their basic one for the rest.

    Args:
        spelling: British to American spellings, as the tokenizer carries them (`english_spelling_normalizer`).
        rules: the spec's `data.text`. References have been through them already, when the rows were prepared.
        normaliser: the spec's `evaluation.normalizer`: whether the basic normaliser leaves marks where they are.

    Source: Radford et al. 2022, appendix C; transformers.models.whisper.english_normalizer. What marks are to scripts
    that write vowels by them: Manohar and Pillai 2024, "What is lost in normalization?".
    """

    def __init__(
        self,
        spelling: dict[str, str] | None,
        rules: TextRules | None = None,
        normaliser: Normaliser = "keep_marks",
    ) -> None:
        self._rules = TextNormaliser(rules)
        self._english = EnglishTextNormalizer(spelling or {})
        self._basic = BasicTextNormalizer()
        # Words are not written apart in these, so each character counts as one, as in Whisper's own tables.
        self._letters = BasicTextNormalizer(split_letters=True)
        if normaliser == "keep_marks":
            self._basic.clean = self._letters.clean = without_punctuation

    @classmethod
    def of(cls, spec: JobSpec, processor: Any) -> Scorer:
        """As a spec says, with the spellings of a checkpoint's processor."""
        spelling = getattr(processor.tokenizer, "english_spelling_normalizer", None)
        return cls(spelling, spec.data.text, spec.evaluation.normalizer)

    def normalise(self, text: str, language: str) -> str:
        """The text as it is compared: no case, no punctuation, numbers and spellings in one form."""
        rule: Callable[[str], str] = self._basic
        if language == "en":
            rule = self._english
        elif language in WITHOUT_SPACES:
            rule = self._letters
        return " ".join(rule(text).split())

    def score(self, record: dict[str, Any], hypothesis: str) -> Utterance:
        """Compare one row (path, language, duration_s, text) with what was heard."""
        reference, language = str(record["text"]), str(record["language"])
        hypothesis = self._rules(hypothesis)
        normal_reference = self.normalise(reference, language)
        normal_hypothesis = self.normalise(hypothesis, language)
        # There the normaliser sets spaces between characters, which are no characters of the text.
        gap = "" if language in WITHOUT_SPACES else " "
        return Utterance(
            path=str(record["path"]),
            language=language,
            duration_s=float(record["duration_s"]),
            reference=reference,
            hypothesis=hypothesis,
            words=word_errors(normal_reference, normal_hypothesis),
            words_raw=word_errors(reference, hypothesis),
            characters=character_errors(normal_reference.replace(" ", gap), normal_hypothesis.replace(" ", gap)),
            characters_raw=character_errors(reference, hypothesis),
            compared_reference=normal_reference,
            compared_hypothesis=normal_hypothesis,
        )


def without_punctuation(text: str) -> str:
    """Spaces in place of symbols and punctuation. Marks stay: in Hindi, Tamil, Thai and others they are the vowels, and
    Whisper's own normaliser, which takes them out, finds no error there and parts words in two."""
    return "".join(
        " " if unicodedata.category(character)[0] in "SP" else character
        for character in unicodedata.normalize("NFKC", text)
    )


def word_errors(reference: str, hypothesis: str) -> Errors:
    """Word edits between two texts."""
    expected, heard = reference.split(), hypothesis.split()
    if not expected:
        return Errors(insertions=len(heard))
    found = jiwer.process_words(" ".join(expected), " ".join(heard))  # jiwer parts words at spaces alone
    return Errors(found.substitutions, found.deletions, found.insertions, len(expected))


def character_errors(reference: str, hypothesis: str) -> Errors:
    """Character edits between two texts, spaces counted."""
    if not reference:
        return Errors(insertions=len(hypothesis))
    found = jiwer.process_characters(reference, hypothesis)
    return Errors(
        found.substitutions, found.deletions, found.insertions, found.hits + found.substitutions + found.deletions
    )


def summarise(utterances: list[Utterance], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Error rates over utterances, in total and per language; rates are fractions.

    Args:
        utterances: at least one.
        bootstrap: resamples of the utterances behind `wer_interval`, the 95 % percentile interval; 0: none.
        seed: the resampling's seed.
    """
    summary = _rates(utterances)
    if bootstrap:
        summary["wer_interval"] = _interval([u.words for u in utterances], bootstrap, seed)
    languages = sorted({utterance.language for utterance in utterances})
    summary["languages"] = {code: _rates([u for u in utterances if u.language == code]) for code in languages}
    return summary


def _rates(utterances: list[Utterance]) -> dict[str, Any]:
    words = _sum(u.words for u in utterances)
    return {
        "wer": words.rate,
        "wer_raw": _sum(u.words_raw for u in utterances).rate,
        "cer": _sum(u.characters for u in utterances).rate,
        "cer_raw": _sum(u.characters_raw for u in utterances).rate,
        "utterances": len(utterances),
        "words": words.length,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
    }


def _sum(errors: Iterable[Errors]) -> Errors:
    return sum(errors, Errors())


def _interval(errors: list[Errors], resamples: int, seed: int) -> list[float]:
    edits_N = np.array([e.total for e in errors])
    words_N = np.array([e.length for e in errors])
    generator = np.random.default_rng(seed)
    rates = np.empty(resamples)
    for index in range(resamples):
        drawn_N = generator.integers(0, len(errors), len(errors))
        rates[index] = edits_N[drawn_N].sum() / max(1, words_N[drawn_N].sum())
    return [float(value) for value in np.percentile(rates, [2.5, 97.5])]
