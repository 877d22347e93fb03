"""The tokenizer has the ids of OpenAI's multilingual Whisper, and survives saving."""

from pathlib import Path

import pytest
from transformers import WhisperProcessor, WhisperTokenizer

from jobs.demo.nano import suppressed_ids, write_processor
from jobs.demo.tokenizer import VOCABULARY_SIZE, build_tokenizer

# What tiktoken gives with openai-whisper's own vocabulary.
KNOWN_IDS = {
    "Hello, world!": [15947, 11, 1002, 0],
    " turn the kitchen light on": [1261, 264, 6525, 1442, 322],
    "¿Qué pasa, señor? 123 4567": [25073, 15137, 20260, 11, 22188, 30, 34466, 6905, 22452],
    "日本語のテキスト": [27311, 31348, 2972, 22985, 15535, 40498],
    "don't I'll we've  double  spaces\n\nnew\tline  ": [
        13966,
        380,
        286,
        603,
        321,
        600,
        220,
        3834,
        220,
        7673,
        198,
        198,
        7686,
        197,
        1889,
        220,
        220,
    ],
    "😀 emoji ffi ﬁ ñandú": [13125, 222, 31595, 283, 13325, 25072, 105, 223, 34110, 474, 2481],
    "1234567890": [4762, 18, 8465, 22452, 23, 7771],
    "中文测试，标点。": [5975, 17174, 11038, 233, 5233, 243, 171, 120, 234, 162, 3921, 12579, 1543],
}
SPECIAL_IDS = {
    "<|endoftext|>": 50257,
    "<|startoftranscript|>": 50258,
    "<|en|>": 50259,
    "<|es|>": 50262,
    "<|su|>": 50357,
    "<|translate|>": 50358,
    "<|transcribe|>": 50359,
    "<|startoflm|>": 50360,
    "<|startofprev|>": 50361,
    "<|nospeech|>": 50362,
    "<|notimestamps|>": 50363,
    "<|0.00|>": 50364,
    "<|2.34|>": 50481,
    "<|30.00|>": 51864,
}


@pytest.fixture(scope="module")
def tokenizer() -> WhisperTokenizer:
    return build_tokenizer()


@pytest.fixture(scope="module")
def reloaded(tokenizer: WhisperTokenizer, tmp_path_factory: pytest.TempPathFactory) -> WhisperTokenizer:
    directory: Path = tmp_path_factory.mktemp("processor")
    write_processor(directory, tokenizer)
    return WhisperProcessor.from_pretrained(directory).tokenizer


@pytest.mark.parametrize(("token", "expected"), SPECIAL_IDS.items())
def test_control_tokens_have_whispers_ids(
    tokenizer: WhisperTokenizer, reloaded: WhisperTokenizer, token: str, expected: int
) -> None:
    assert tokenizer.convert_tokens_to_ids(token) == expected
    assert reloaded.convert_tokens_to_ids(token) == expected


@pytest.mark.parametrize(("text", "expected"), KNOWN_IDS.items())
def test_text_has_whispers_ids(reloaded: WhisperTokenizer, text: str, expected: list[int]) -> None:
    assert reloaded.encode(text, add_special_tokens=False) == expected
    assert reloaded.decode(expected) == text


def test_vocabulary_has_whispers_size(tokenizer: WhisperTokenizer, reloaded: WhisperTokenizer) -> None:
    assert len(tokenizer) == len(reloaded) == VOCABULARY_SIZE


def test_timestamps_begin_after_the_last_special_token(reloaded: WhisperTokenizer) -> None:
    assert reloaded.all_special_ids[-1] == 50363
    ids = [50258, 50259, 50359, 50364, 1261, 264, 1442, 322, 50481, 50257]
    assert reloaded.decode(ids, skip_special_tokens=True) == " turn the light on"
    offsets = reloaded.decode(ids, skip_special_tokens=True, output_offsets=True)["offsets"]
    assert offsets == [{"text": " turn the light on", "timestamp": (0.0, pytest.approx(2.34))}]


def test_spelling_table_is_saved_with_the_processor(reloaded: WhisperTokenizer) -> None:
    assert reloaded.normalize("Mr. Smith's colour!") == "mister smith is color"


def test_suppressed_tokens_are_those_of_openais_checkpoints(tokenizer: WhisperTokenizer) -> None:
    suppressed = suppressed_ids(tokenizer)
    assert suppressed[:12] == [1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29]
    assert suppressed[-6:] == [50258, 50358, 50359, 50360, 50361, 50362]
    assert len(suppressed) == 88
