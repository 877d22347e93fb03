"""Transcripts become the decoder tokens that Whisper was trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.manifest.row import Row, Segment
from jobs.tokens import IGNORE, Prompter, Tokens, pad
from service.errors import SpecError
from service.spec.languages import LANGUAGES, WITHOUT_SPACES

EOT, START, EN, ES, TRANSCRIBE, NO_SPEECH, NO_TIMESTAMPS = 50257, 50258, 50259, 50262, 50359, 50362, 50363
OF_LARGE_V3 = "yue"
"""Has a token in large-v3's vocabulary only."""


@pytest.fixture(scope="module")
def prompter(processor: Any) -> Prompter:
    return Prompter(processor.tokenizer, multilingual=True, max_tokens=448)


@pytest.fixture(scope="module")
def english(processor: Any) -> Prompter:
    """As for an `.en` checkpoint."""
    return Prompter(processor.tokenizer, multilingual=False, max_tokens=448)


def test_inputs_hold_the_prompt_and_labels_are_the_inputs_one_step_on(prompter: Prompter) -> None:
    tokens = prompter.encode("open the window", "es")
    assert tokens.inputs[:4] == [START, ES, TRANSCRIBE, NO_TIMESTAMPS]
    assert tokens.labels[:-1] == tokens.inputs[1:]
    assert tokens.labels[0] == ES, "labels begin after the start token"
    assert tokens.labels[-1] == EOT
    assert EOT not in tokens.inputs


@pytest.mark.parametrize("language", sorted(set(LANGUAGES) - {OF_LARGE_V3}))
def test_the_sequence_is_the_one_of_transformers_tokenizer(processor: Any, prompter: Prompter, language: str) -> None:
    text = "Yes, 3 o'clock!"
    processor.tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
    spoken = text if language in WITHOUT_SPACES else f" {text}"
    expected = processor.tokenizer(spoken).input_ids
    tokens = prompter.encode(text, language)
    assert [*tokens.inputs, tokens.labels[-1]] == expected
    assert tokens.inputs[:4] == list(processor.tokenizer.prefix_tokens)


def test_an_english_only_checkpoint_gets_no_language_and_no_task(english: Prompter) -> None:
    tokens = english.encode("open", "en")
    assert tokens.inputs[:2] == [START, NO_TIMESTAMPS]
    assert tokens.labels[0] == NO_TIMESTAMPS
    assert len(tokens.inputs) == 3


def test_text_begins_with_one_space(processor: Any, prompter: Prompter) -> None:
    plain = prompter.encode("open the window", "en")
    assert processor.tokenizer.decode(plain.inputs[4:]) == " open the window"
    assert prompter.encode("  open the window \n", "en") == plain


@pytest.mark.parametrize("language", sorted(WITHOUT_SPACES - {OF_LARGE_V3}))
def test_languages_without_spaces_begin_without_one(processor: Any, prompter: Prompter, language: str) -> None:
    tokens = prompter.encode(" 你好 ", language)
    assert processor.tokenizer.decode(tokens.inputs[4:]) == "你好"


@given(st.text(max_size=60))
def test_any_transcript_comes_back_from_its_tokens(processor: Any, prompter: Prompter, text: str) -> None:
    text = text.strip()
    tokens = prompter.encode(text, "en")
    assert processor.tokenizer.decode(tokens.labels[3:-1], clean_up_tokenization_spaces=False) == f" {text}"


def test_only_languages_with_a_token_are_known(prompter: Prompter, english: Prompter) -> None:
    assert {code for code in LANGUAGES if prompter.knows_language(code)} == set(LANGUAGES) - {OF_LARGE_V3}
    assert [code for code in LANGUAGES if english.knows_language(code)] == ["en"]


@pytest.mark.parametrize("word", ["transcribe", "nospeech", "startofprev", "0.00", "EN", "english", "xx", ""])
def test_a_control_token_is_no_language(prompter: Prompter, word: str) -> None:
    assert not prompter.knows_language(word)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello<|endoftext|>", "<|endoftext|>"),
        ("<|0.00|> hello <|1.00|>", "<|0.00|>"),
        ("a <|foo|> b <|en|>", "<|en|>"),
        ("a < b | c > d", None),
        ("<|foo|>", None),
        ("", None),
    ],
)
def test_control_tokens_in_a_transcript_are_found(prompter: Prompter, text: str, expected: str | None) -> None:
    assert prompter.control_token(text) == expected


def test_a_vocabulary_without_whispers_tokens_is_refused() -> None:
    class Unknown:
        eos_token_id = EOT

        def get_added_vocab(self) -> dict[str, int]:
            return {}

        def convert_tokens_to_ids(self, token: str) -> int:
            return EOT

    with pytest.raises(SpecError, match=r"no token <\|startoftranscript\|>"):
        Prompter(Unknown(), multilingual=True, max_tokens=448).prompt("en")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_labels_are_masked_by_length_and_never_by_id(lengths: list[int]) -> None:
    # Every label is the end token, which is Whisper's padding token as well.
    rows = [Tokens([START] * length, [EOT] * length) for length in lengths]
    inputs_BT, labels_BT = pad(rows, fill=EOT)
    assert inputs_BT.shape == labels_BT.shape == (len(lengths), max(lengths))
    assert inputs_BT.dtype == labels_BT.dtype == torch.int64
    for index, length in enumerate(lengths):
        assert labels_BT[index].tolist() == [EOT] * length + [IGNORE] * (max(lengths) - length)
        assert inputs_BT[index].tolist() == [START] * length + [EOT] * (max(lengths) - length)


def test_segments_stand_between_their_times(processor: Any, prompter: Prompter) -> None:
    segments = (Segment(0.0, 1.28, "open the window"), Segment(1.28, 40.0, "call me"))
    tokens = prompter.encode_segments(segments, "es")
    assert tokens.inputs[:3] == [START, ES, TRANSCRIBE]
    assert tokens.labels[:-1] == tokens.inputs[1:]
    assert tokens.labels[-1] == EOT
    text = processor.tokenizer.decode(tokens.inputs[3:], decode_with_timestamps=True)
    assert text == "<|0.00|> open the window<|1.28|><|1.28|> call me<|30.00|>"


def test_a_clip_without_speech_is_the_no_speech_token_after_the_start(prompter: Prompter, english: Prompter) -> None:
    for one in (prompter, english):
        assert one.encode_row({"no_speech": True, "text": "", "language": "en"}) == Tokens(
            [START, NO_SPEECH], [NO_SPEECH, EOT]
        )
    batch = pad([prompter.encode_no_speech(), prompter.encode("open", "en")], fill=EOT)
    assert batch[1][0].tolist() == [NO_SPEECH, EOT] + [IGNORE] * (batch[1].shape[1] - 2)


def test_a_row_takes_the_positions_of_its_longest_form(prompter: Prompter) -> None:
    plain = Row("a", "a", "one two", "en")
    timed = Row("a", "a", "one two", "en", segments=(Segment(0, 1, "one"), Segment(1, 2, "two")))
    assert prompter.count(plain) == len(prompter.encode("one two", "en").inputs)
    assert prompter.count(timed) == prompter.count(plain) + 3
    assert prompter.count(timed, timestamps=False) == prompter.count(plain)
    assert prompter.count(Row("a", "a", "", "en", no_speech=True)) == 2
