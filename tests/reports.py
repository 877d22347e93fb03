"""Roots of runs for tests of the report, written by hand in the documented form: any case, without a training."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer

from service import artifacts
from service.artifacts import BaseModelRecord, RunManifest, file_records
from service.spec.job import JobSpec
from service.storage import Storage
from service.trials import Evaluation, Search, Trial

HOSTILE = {
    "image": "<img src=x onerror=\"alert('image')\">",
    "script": "</script><script>alert('script')</script>",
    "comment": "<!-- <script> --!> ]]>",
    "template": "{{7*7}} ${7*7} {% raw %}",
    "escapes": "\x1b[2J\x1b]0;owned\x07 \x9b31m [bold red]markup[/] :smile:",
    "direction": "\u202egnihtemos\u202c \u2066x\u2069",
    "combining": "z\u0341\u0341\u0353\u0353\u0329 a\u0301\u0301\u0301\u0301",
    "separators": "one\u2028two\u2029three\x0bfour\x85five",
    "long": "a" * 10_000,
    "surrogate": "\ud800 lone",
    "quotes": "\"'`</li></ol>&lt;b&gt;",
}
"""Transcripts that would do harm, or break a page, if they were taken for more than text."""


def utterance(
    path: str,
    reference: str,
    hypothesis: str,
    language: str = "en",
    duration_s: float = 2.0,
    compared: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """A line of evaluation/*.jsonl.

    Args:
        compared: both texts after the normaliser; in lower case, where not given.
    """
    said, heard = compared or (reference.lower(), hypothesis.lower())
    said, heard = " ".join(said.split()), " ".join(heard.split())
    found = jiwer.process_words(said, heard) if said else None
    counts = {
        "substitutions": found.substitutions if found else 0,
        "deletions": found.deletions if found else 0,
        "insertions": found.insertions if found else len(heard.split()),
        "length": len(said.split()),
    }
    kinds = ("words", "words_raw", "characters", "characters_raw")
    line = {"path": path, "language": language, "duration_s": duration_s, "reference": reference}
    line |= {"hypothesis": hypothesis} | dict.fromkeys(kinds, counts)
    return line | {"compared_reference": said, "compared_hypothesis": heard}


def rates(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A model's entry in metrics.json."""

    def total(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sums = {key: sum(line["words"][key] for line in chosen) for key in ("substitutions", "deletions", "insertions")}
        words = sum(line["words"]["length"] for line in chosen)
        wer = sum(sums.values()) / max(1, words)
        return {
            "wer": wer,
            "wer_raw": wer,
            "cer": wer / 2,
            "cer_raw": wer / 2,
            "utterances": len(chosen),
            "words": words,
        } | sums

    found = total(lines)
    codes = sorted({line["language"] for line in lines})
    return found | {
        "wer_interval": [0.9 * found["wer"], 1.1 * found["wer"]],
        "languages": {code: total([line for line in lines if line["language"] == code]) for code in codes},
    }


BASE = (
    utterance("/data/a.wav", "Turn the light on", "turn a night on", duration_s=1.2),
    utterance("/data/b.wav", "Call my mother now", "call mother", duration_s=3.4),
    utterance("/data/c.wav", "Abre la puerta", "abre la puerta ahora", "es", 2.1),
)
TUNED = (
    utterance("/data/a.wav", "Turn the light on", "turn the light on", duration_s=1.2),
    utterance("/data/b.wav", "Call my mother now", "call my brother now", duration_s=3.4),
    utterance("/data/c.wav", "Abre la puerta", "abre una puerta ahora ya", "es", 2.1),
)


def metrics_of(
    base: Sequence[dict[str, Any]] = BASE, tuned: Sequence[dict[str, Any]] = TUNED, **changes: Any
) -> dict[str, Any]:
    """metrics.json of a training."""
    found: dict[str, Any] = {
        "job_id": "calls-nl-12345678",
        "base": rates(base),
        "tuned": rates(tuned),
        "adapter": {
            "modules": 32,
            "trainable_parameters": 90_112,
            "coverage": {
                "encoder self-attention": {"adapted": 8, "changed": 8},
                "cross-attention": {"adapted": 8, "changed": 8},
            },
        },
        "training": {
            "steps": 40,
            "effective_batch": 8,
            "best_step": 30,
            "clips_per_s": 17.25,
            "precision": "no",
            "device": "cpu",
        },
        "merge": {"max_logit_difference": 1e-5, "identical": 1.0},
        "artifacts": {
            "hf": {
                "runtime": "transformers",
                "version": "transformers 5.23.0",
                "compute_type": "float32",
                "wer": 0.1,
                "wer_compared": 0.1,
                "identical": 1.0,
                "wer_default": 0.11,
                "rtf": 0.02,
                "size_bytes": 20_400_000,
            },
            "ggml-q8_0": {
                "runtime": "whisper.cpp",
                "version": "pywhispercpp 1.5.1",
                "compute_type": "q8_0",
                "wer": 0.4,
                "identical": 0.5,
                "rtf": 0.03,
                "size_bytes": 4_900_000,
                "refused": "its WER is 30 points above that of hf",
            },
        },
        "promoted": True,
        "promotion_reasons": [],
        "seconds": {"prepare": 4.0, "train": 145.0, "merge": 11.0, "total": 160.0},
    }
    return found | changes


DATA = {
    "train": {
        "rows": 309,
        "hours": 0.15,
        "languages": {"en": 242, "es": 67},
        "language_hours": {"en": 0.12, "es": 0.03},
        "lengths": {"bin_s": 0.5, "clips": [0, 4, 80, 160, 60, 5]},
        "longest_tokens": 9,
        "rejected": 2,
        "reasons": {"silent": 2},
        "sha256": "7" * 64,
    },
    "val": {
        "rows": 3,
        "hours": 0.002,
        "languages": {"en": 2, "es": 1},
        "language_hours": {"en": 0.001, "es": 0.001},
        "lengths": {"bin_s": 0.5, "clips": [0, 0, 1, 0, 1, 0, 1]},
        "longest_tokens": 9,
        "rejected": 1,
        "reasons": {"unreadable": 1},
        "sha256": "9" * 64,
    },
    "sentences_in_both": 0,
}
REJECTS = (
    "split,path,kind,reason\n"
    'train,/data/x.wav,silent,"its loudness is -71.0 dBFS"\n'
    'train,/data/y.wav,silent,"its loudness is -66.2 dBFS"\n'
    "val,/data/<b>z.wav,unreadable,no such file\n"
)


def training_events(steps: int = 40, trial: str | None = None) -> list[dict[str, Any]]:
    """What a training says: a step of every two, an evaluation of every ten."""
    extra = {"trial": trial} if trial else {}
    found: list[dict[str, Any]] = [{"event": "model", "steps": steps, "resumed_from_step": 0} | extra]
    for step in range(2, steps + 1, 2):
        values = {"loss": 4 / step, "lr": 1e-4 * (1 - step / steps), "grad_norm": 2 / step, "clips_per_s": 17.0}
        found.append({"event": "step", "step": step, "steps": steps} | values | extra)
        if step % 10 == 0:
            found.append(
                {"event": "evaluation", "step": step, "wer": 0.6 - step / 100, "cer": 0.3 - step / 200} | extra
            )
    return found


def json_lines(records: Sequence[dict[str, Any]]) -> bytes:
    """A file of JSON lines."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    return "".join(lines).encode("utf-8", "backslashreplace")  # a lone surrogate as JSON's own escape


def write_run(
    folder: Path,
    *,
    base: Sequence[dict[str, Any]] | None = BASE,
    tuned: Sequence[dict[str, Any]] | None = TUNED,
    metrics: dict[str, Any] | None = None,
    events: Sequence[dict[str, Any]] | None = None,
    search: Search | None = None,
    rejects: str | None = REJECTS,
    complete: bool = True,
    spec: dict[str, Any] | None = None,
    **training: Any,
) -> Storage:
    """A root as a finished training leaves it. Parts that are None are left out; `training` are settings."""
    root = Storage(str(folder))
    content = JobSpec.model_validate({"name": "calls-nl", "training": {"base_model": "openai/whisper-tiny"} | training})
    written = content.model_dump(mode="json") | ({"kind": "search"} if search else {}) | (spec or {})
    root.write_json(artifacts.SPEC, written)
    for name, lines in ((artifacts.BASE_LINES, base), (artifacts.TUNED_LINES, tuned)):
        if lines is not None:
            root.write_bytes(name, json_lines(lines))
    root.write_bytes(artifacts.EVENTS, json_lines(training_events() if events is None else events))
    if rejects is not None:
        root.write_text(artifacts.REJECTS, rejects)
    if search:
        root.write_text(artifacts.TRIALS, search.model_dump_json(indent=2))
    found = metrics_of(base or BASE, tuned or TUNED) if metrics is None else metrics
    if complete:
        root.write_json(artifacts.METRICS, found)
        manifest = manifest_of(found).model_copy(update={"files": file_records(root)})
        root.write_text(artifacts.MANIFEST, manifest.model_dump_json(indent=2))
    return root


def manifest_of(metrics: dict[str, Any]) -> RunManifest:
    """manifest.json without its files."""
    return RunManifest(
        job_id=str(metrics.get("job_id", "calls-nl-12345678")),
        kind="train",
        spec_sha256="5" * 64,
        created="2026-11-25T03:35:54+00:00",
        versions={"python": "3.11.7", "torch": "2.13.0+cpu"},
        base=BaseModelRecord(name="openai/whisper-tiny", revision="c0ffee", weights_sha256={}),
        data=DATA,
        wer={},
        promoted=metrics.get("promoted"),
        files=[],
    )


def make_search(trials: int = 40, failed: int = 2, metric: str = "wer", seed: int = 0, **changes: Any) -> Search:
    """A search's table: DoRA on and off, a rate over two magnitudes, a setting that only some trials have."""
    draw = random.Random(seed)
    rows = [Trial(id="untuned", origin="untuned", settings={}, status="finished", score=0.6)]
    for index in range(trials):
        settings: dict[str, Any] = {
            "training.lr": 10 ** draw.uniform(-5, -3),
            "training.lora_r": draw.choice([4, 8, 16, 32, 64]),
            "training.use_dora": draw.random() < 0.5,
            "training.lora_target_modules": draw.choice(
                [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]]
            ),
        }
        if draw.random() < 0.6:
            settings["training.lora_dropout"] = draw.choice([0.0, 0.05, 0.1])
        rank = settings["training.lora_r"]
        if 0 < index <= failed:
            cause = "the loss is nan at step 12; lower training.lr"
            rows.append(
                Trial(id=f"t{index:03}", origin="tpe", settings=settings, status="failed", cause=cause, seconds=20.0)
            )
            continue
        best = 0.1 + 0.12 * abs(draw.gauss(0, 1)) + 0.5 / rank**0.5 / 4
        stopped = index % 3 == 2
        steps = 60 if stopped else 234
        speed = draw.uniform(0.6, 1.1)
        evaluations = [
            Evaluation(number=number, step=step, seed=0, score=best + 0.5 / number, seconds=speed * step).model_copy(
                update={metric: best + 0.5 / number}
            )
            for number, step in enumerate(range(20, steps + 1, 20), start=1)
        ]
        rows.append(
            Trial(
                id=f"t{index:03}",
                origin="defaults" if index == 0 else "tpe",
                settings=settings,
                status="stopped" if stopped else "finished",
                cause="its evaluation 3 was not among the best half" if stopped else None,
                score=evaluations[-1].score,
                scores=[evaluations[-1].score],
                steps=234,
                step=evaluations[-1].step,
                trainable_parameters=rank * 5632,
                seconds=speed * steps + 12,
                evaluations=evaluations,
            )
        )
    scored = [row for row in rows[1:] if row.score is not None]
    winner = min(scored, key=lambda row: row.score or 0.0).id if scored else None
    found: dict[str, Any] = {
        "metric": metric,
        "sampler": "tpe",
        "scheduler": "asha",
        "seed": 0,
        "repeats": 1,
        "evaluations": 11,
        "planned": trials,
        "trials": rows,
        "winner": winner,
        "verdict": f"{winner} is the best of {len(scored)} scored trials." if winner else None,
        "importance": {
            "training.lr": 0.55,
            "training.lora_r": 0.3,
            "training.use_dora": 0.1,
            "training.lora_dropout": 0.05,
        }
        if winner
        else {},
        "gpu_hours": 1.25,
    }
    return Search.model_validate(found | changes)


WORDS = ("the", "a", "light", "window", "please", "call", "turn", "open", "close", "doctor", "mother", "garden")


def many_utterances(count: int, seed: int = 0, error_rate: float = 0.2) -> list[dict[str, Any]]:
    """Utterances of 1 to 28 s in four languages; with the same seed those of another rate have the same references."""
    said, heard = random.Random(seed), random.Random(seed + error_rate)
    found = []
    for index in range(count):
        language = said.choice(["en", "en", "en", "de", "ar", "ja"])
        length = said.uniform(1, 28)
        reference = [said.choice(WORDS) for _ in range(max(2, int(length * 1.5)))]
        if language == "ar":
            reference = [said.choice(["افتح", "الباب", "النافذة", "غدا", "ببطء"]) for _ in reference]
        elif language == "ja":
            reference = [said.choice("窓を開けてください明日") for _ in reference]
        hypothesis = []
        for word in reference:
            dice = heard.random()
            if dice < error_rate * 0.2:
                continue
            hypothesis.append(heard.choice(reference) if dice < error_rate * 0.8 else word)
            if dice > 1 - error_rate * 0.2:
                hypothesis.append(heard.choice(reference))
        gap = "" if language == "ja" else " "
        found.append(
            utterance(
                f"/data/val/{language}/{index:05}.flac",
                gap.join(reference),
                gap.join(hypothesis),
                language,
                round(length, 2),
                (" ".join(reference), " ".join(hypothesis)),
            )
        )
    return found
