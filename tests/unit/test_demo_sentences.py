"""The demo's sentences: unique, repeatable, and safe for file names and for the normaliser."""

import pytest
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from jobs.demo.sentences import LANGUAGES, all_sentences, sample_sentences, words
from jobs.demo.tokenizer import read_spellings


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_unique_and_short(language: str) -> None:
    sentences = all_sentences(language)
    assert len(set(sentences)) == len(sentences) > 800
    assert {len(sentence.split()) for sentence in sentences} <= set(range(3, 7))


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_can_stand_in_a_file_name(language: str) -> None:
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words(language))


def test_normaliser_keeps_every_english_word_apart() -> None:
    normalise = EnglishTextNormalizer(read_spellings())
    normalised = [normalise(word) for word in words("en")]
    assert len(set(normalised)) == len(normalised)
    assert not any(" " in word or any(letter.isdigit() for letter in word) for word in normalised)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_seed_draws_the_same_sentences(language: str) -> None:
    drawn = sample_sentences(language, 200, seed=3)
    assert drawn == sample_sentences(language, 200, seed=3)
    assert drawn != sample_sentences(language, 200, seed=4)
    assert len(set(drawn)) == 200


def test_asking_for_too_many_sentences_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match="the es grammar has 900 sentences"):
        sample_sentences("es", 901, seed=0)
