"""Word error rates by generation: ours beside Seq2SeqTrainer's evaluation with predict_with_generate.

    python tests/benchmarks/evaluation.py [--shape nano] [--clips 64] [--seconds 3] [--max-new-tokens 64]

A base with LoRA adapters in its decoder, after a few steps on the clips. `plain` evaluates in batches of 8, as it is,
`plain_tuned` in batches of 64 with workers that read; `ours` as a first evaluation does, `ours_kept` as each one after
it does where the encoder is frozen, with its outputs kept. On a GPU all of them generate in bf16, by autocast. Prints
JSON: ratios of the plain sides' seconds to ours, word error rates, peaks of memory, and `same_text`: the share of clips
whose text is that of generate() at batch 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import plain
import torch
from bases import SHAPES, default_shape, write_base, write_clips
from measured import averaged, command, device, machine, peak_memory
from transformers import WhisperProcessor

from jobs.evaluate import evaluate
from jobs.fast.encoder_outputs import EncoderOutputs, Origin, SplitOutputs
from jobs.fast.places import Memory
from jobs.model import Whisper
from jobs.score import Scorer, Utterance
from service.spec.sections import EvaluationConfig


class Rows:
    """As much of a data set as scoring needs."""

    def __init__(self, clips: list[Any], seconds: float) -> None:
        self._records = [
            {"path": str(path), "text": text, "language": language, "duration_s": seconds}
            for path, text, language in clips
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: int | str) -> Any:
        return [record[key] for record in self._records] if isinstance(key, str) else self._records[key]


def measure(shape: str, clips: int, seconds: float, longest: int, turns: int) -> dict[str, Any]:
    """Run all sides; see the module."""
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-bench-") as scratch:
        folder = Path(scratch)
        base, rows = write_base(folder, shape), write_clips(folder / "clips", clips, seconds)
        processor = WhisperProcessor.from_pretrained(base)
        model = plain.adapted(base, plain.Recipe(frozen_encoder=True), tuned=True).to(device())
        _learn(model, processor, rows[:8])
        ran: dict[str, list[dict[str, Any]]] = defaultdict(list)
        said: dict[str, list[Utterance]] = {}
        whisper, data = Whisper(str(base), model, processor, torch.float32), Rows(rows, seconds)
        precision = "bf16" if device().type == "cuda" else "no"
        origin = Origin("benchmark", None, "sdpa", precision, device().type, (("val", ""),))
        outputs = EncoderOutputs(origin, device(), [Memory("here", device(), 10**11)]).of("val")
        settings = EvaluationConfig(max_new_tokens=longest)
        _ours(whisper, data, settings, outputs)  # fills them
        for _ in range(turns):
            for name, tuned in (("plain", False), ("plain_tuned", True)):
                # Its length counts the prompt's four tokens.
                ran[name].append(vars(plain.score(model, processor, rows, longest=longest + 4, tuned=tuned)))
            for name, kept in (("ours", None), ("ours_kept", outputs)):
                made, said[name] = _ours(whisper, data, settings, kept)
                ran[name].append(made)
        sides = {name: averaged(each) for name, each in ran.items()}
        alone = EvaluationConfig(max_new_tokens=longest, batch_size=1, fast_decoding=False)
        _, reference = _ours(whisper, data, alone, None)

    def share(heard: list[Utterance]) -> float:
        same = sum(one.hypothesis == other.hypothesis for one, other in zip(heard, reference, strict=True))
        return round(same / len(reference), 4)

    ratios = {
        f"evaluation{mine.removeprefix('ours')}{name.removeprefix('plain').replace('_', '_over_')}": round(
            sides[name]["seconds"] / sides[mine]["seconds"], 2
        )
        for name in ("plain", "plain_tuned")
        for mine in ("ours", "ours_kept")
    }
    return {
        "ratios": ratios,
        "equality": {"same_text": {name: share(heard) for name, heard in said.items()}},
        "shape": shape,
        "clips": clips,
        "runs": sides,
    }


def scorer_of(processor: Any) -> Scorer:
    """What compares texts, as jobs have it where their specs say nothing."""
    return Scorer(processor.tokenizer.english_spelling_normalizer)


def _learn(model: Any, processor: Any, rows: list[Any]) -> None:
    """A few steps, so that adapters say something of their own."""
    clips = plain.Clips(processor, rows)
    batch = plain.collate([clips[index] for index in range(len(clips))])
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    for _ in range(3):
        model(**{name: tensor.to(device()) for name, tensor in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _ours(
    whisper: Whisper, data: Rows, settings: EvaluationConfig, outputs: SplitOutputs | None
) -> tuple[dict[str, Any], list[Utterance]]:
    with peak_memory() as peak, torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
        began = time.perf_counter()
        utterances, summary = evaluate(
            whisper.model, whisper.processor, data, settings,
            scorer=scorer_of(whisper.processor), multilingual=True, bootstrap=0, outputs=outputs,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    return vars(plain.Scored(seconds, summary["wer"], peak[0])), utterances


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default=default_shape())
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    found = measure(options.shape, options.clips, options.seconds, options.max_new_tokens, options.turns)
    print(json.dumps({"command": command()} | machine() | found, indent=2))


if __name__ == "__main__":
    main()
