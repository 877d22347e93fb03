"""The multilingual Whisper tokenizer (51,865 ids), built offline from the ranks that OpenAI published.

The ids are those of `openai/whisper-small` and of every multilingual checkpoint up to large-v2:

    0..50256      byte-pair tokens          50360  <|startoflm|>
    50257         <|endoftext|>             50361  <|startofprev|>
    50258         <|startoftranscript|>     50362  <|nospeech|>
    50259..50357  99 languages              50363  <|notimestamps|>
    50358         <|translate|>             50364  <|0.00|> ... 51864  <|30.00|>
    50359         <|transcribe|>
"""

import base64
import json
import lzma
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path

from transformers import AddedToken, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.whisper.tokenization_whisper import LANGUAGES

ASSETS = Path(__file__).parent / "assets"
VOCABULARY_SIZE = 51865
LANGUAGE_COUNT = 99
END_OF_TEXT = "<|endoftext|>"
TIMESTAMP_STEP_S = 0.02
TIMESTAMP_COUNT = 1501


def special_tokens() -> list[str]:
    """Control tokens in the order of their ids, 50257 to 50363."""
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:LANGUAGE_COUNT]]
    tasks = ["<|translate|>", "<|transcribe|>"]
    contexts = ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    return [END_OF_TEXT, "<|startoftranscript|>", *languages, *tasks, *contexts]


def timestamp_tokens() -> list[str]:
    """Timestamps in the order of their ids, 50364 (0 s) to 51864 (30 s)."""
    return [f"<|{index * TIMESTAMP_STEP_S:.2f}|>" for index in range(TIMESTAMP_COUNT)]


def read_ranks() -> dict[bytes, int]:
    """Read OpenAI's merge ranks: the lower a token's rank, the earlier its two parts are joined."""
    lines = lzma.decompress((ASSETS / "multilingual.tiktoken.xz").read_bytes()).splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def split_before_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Encode `token` with the merges older than its own: two parts remain, those that its own merge joins."""
    parts = [bytes([byte]) for byte in token]
    limit = ranks[token]
    while True:
        pairs = enumerate(pairwise(parts))
        candidates = [(ranks.get(left + right, limit), at) for at, (left, right) in pairs]
        rank, at = min(candidates, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@cache
def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Turn ranks into the form of `vocab.json` and `merges.txt`, with bytes written as printable characters.

    Raises:
        ValueError: the ranks are not those of a byte-pair encoding.
    """
    letters = bytes_to_unicode()
    ranks = read_ranks()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        # Single bytes come first and need no merge; the last rank belongs to the empty string, as OpenAI left it.
        if len(token) < 2:
            continue
        parts = split_before_merge(token, ranks)
        if len(parts) != 2:
            raise ValueError(f"{ASSETS / 'multilingual.tiktoken.xz'}: {token!r} is not a merge of two tokens")
        merges.append((spelled[parts[0]], spelled[parts[1]]))
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    vocabulary[END_OF_TEXT] = len(vocabulary)
    return vocabulary, merges


def read_spellings() -> dict[str, str]:
    """Read the British to American spellings that Whisper's English text normaliser applies before a WER."""
    table: dict[str, str] = json.loads(lzma.decompress((ASSETS / "english.json.xz").read_bytes()))
    return table


def build_tokenizer() -> WhisperTokenizer:
    """Build the tokenizer with no network and no downloaded checkpoint.

    Raises:
        ValueError: the finished tokenizer does not have Whisper's ids.
    """
    vocabulary, merges = vocabulary_and_merges()
    with tempfile.TemporaryDirectory() as directory:
        # The tokenizer takes the spelling table by file name alone.
        spellings = Path(directory) / "normalizer.json"
        spellings.write_text(json.dumps(read_spellings()), encoding="utf-8")
        tokenizer = WhisperTokenizer(
            vocab=dict(vocabulary),
            merges=list(merges),
            normalizer_file=str(spellings),
            pad_token=END_OF_TEXT,
            model_max_length=1024,
        )
    # transformers reads the first timestamp's id as "last special id + 1": timestamps must not be special tokens.
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens()[1:]})
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in timestamp_tokens()])
    if len(tokenizer) != VOCABULARY_SIZE or tokenizer.convert_tokens_to_ids("<|nospeech|>") != 50362:
        raise ValueError(f"the tokenizer has {len(tokenizer)} ids in an unknown order, not Whisper's {VOCABULARY_SIZE}")
    # The prefix was made before these tokens existed.
    tokenizer.set_prefix_tokens()
    return tokenizer
