"""Write nano Whisper as an ordinary transformers checkpoint: `python -m jobs.demo.nano DIRECTORY`."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperTokenizer
from transformers.utils import logging as transformers_logging

from jobs.demo.compact import END_OF_TEXT_ID, START_ID, NanoConfig, expand, kept_token_ids
from jobs.demo.tokenizer import ASSETS, build_tokenizer, special_tokens
from jobs.export.processor_files import save_processor

WEIGHTS = ASSETS / "nano_whisper.safetensors"
CONFIG = ASSETS / "nano_whisper.json"


def write_nano_whisper(directory: Path) -> None:
    """Expand the stored weights to a checkpoint that `from_pretrained` opens; the same bytes every time.

    Args:
        directory: made where missing. Files of the same names are replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = NanoConfig(**json.loads(CONFIG.read_text(encoding="utf-8"))["model"])
    # The weights are loaded over an initialisation that would else disturb the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        model = expand(load_file(WEIGHTS), config, kept_token_ids(tokenizer))
    model.generation_config = generation_config(tokenizer, config)
    model.save_pretrained(directory)
    write_processor(directory, tokenizer)


def generation_config(tokenizer: WhisperTokenizer, config: NanoConfig) -> GenerationConfig:
    """The settings that Whisper's `generate` needs; language and task are left to its caller."""
    ids = tokenizer.convert_tokens_to_ids
    languages = special_tokens()[2:101]
    last = config.decoder_layers - 1
    return GenerationConfig(
        is_multilingual=True,
        lang_to_id={token: ids(token) for token in languages},
        task_to_id={task: ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids("<|notimestamps|>"),
        prev_sot_token_id=ids("<|startofprev|>"),
        decoder_start_token_id=START_ID,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
        begin_suppress_tokens=[*tokenizer.encode(" ", add_special_tokens=False), END_OF_TEXT_ID],
        suppress_tokens=suppressed_ids(tokenizer),
        max_initial_timestamp_index=50,
        max_length=448,
        return_timestamps=False,
        alignment_heads=[[last, head] for head in range(config.heads)],
    )


def suppressed_ids(tokenizer: WhisperTokenizer) -> list[int]:
    """Tokens that no one speaks, the list of openai-whisper: brackets, notes, speaker tags, control tokens."""
    symbols = list('"#()*+/:;<=>@[\\]^_`{|}~「」『』')
    symbols += ["<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))", "(((", ")))"]
    symbols += ["[[", "]]", "{{", "}}", "♪♪", "♪♪♪"]
    # Each of these may be several tokens, of which the first is the telling one.
    notes = list("♩♪♫♬♭♮♯")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    suppressed = {encode(" -")[0], encode(" '")[0]}
    for symbol in symbols + notes:
        for ids in (encode(symbol), encode(" " + symbol)):
            if len(ids) == 1 or symbol in notes:
                suppressed.add(ids[0])
    control = ["<|startoftranscript|>", "<|translate|>", "<|transcribe|>"]
    control += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    return sorted(suppressed) + tokenizer.convert_tokens_to_ids(control)


def write_processor(directory: Path, tokenizer: WhisperTokenizer) -> None:
    """Write tokenizer and feature extractor, in the files of transformers 5 and those that older tools read."""
    save_processor(tokenizer, WhisperFeatureExtractor(feature_size=80), directory)


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    write_nano_whisper(Path(sys.argv[1]))
