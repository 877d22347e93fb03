"""Clips are transcribed in batches, each in its row's language, and the batches change nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from jobs.audio import read_audio
from jobs.evaluate import evaluate
from jobs.manifest.rows import read_rows
from jobs.score import Scorer
from jobs.transcribe import generation_arguments, shard, transcribe
from service.errors import ManifestError
from service.spec.sections import EvaluationConfig

SETTINGS = EvaluationConfig(batch_size=4, max_new_tokens=24, bootstrap=20)


class Rows:
    """As much of a data set as transcribing needs."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | str) -> Any:
        return [record[key] for record in self.records] if isinstance(key, str) else self.records[key]


@pytest.fixture(scope="module")
def rows(manifest: Path) -> Rows:
    """Ten held-out clips, of which some are Spanish."""
    found = [vars(row) for row in read_rows(str(manifest / "train.csv"), "en")][:10]
    assert {row["language"] for row in found} == {"en", "es"}
    return Rows([row | {"duration_s": len(read_audio(row["path"])) / 16_000} for row in found])


@pytest.fixture(scope="module")
def model(nano: Path) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(nano).eval()


def heard(model: Any, processor: Any, rows: Rows, order: list[int], **settings: Any) -> dict[int, str]:
    """Text by row."""
    options = SETTINGS.model_copy(update=settings)
    found = list(transcribe(model, processor, rows, order, options, multilingual=True))
    assert [item.row for item in found] == order
    return {item.row: item.text for item in found}


@pytest.fixture(scope="module")
def alone(model: Any, processor: Any, rows: Rows) -> dict[int, str]:
    """What transformers' own generate() makes of each clip by itself."""
    texts = {}
    for index, row in enumerate(rows.records):
        clip = [read_audio(row["path"])]
        features = processor.feature_extractor(clip, sampling_rate=16_000, return_tensors="pt").input_features
        tokens = model.generate(features, language=row["language"], task="transcribe", max_new_tokens=24)
        texts[index] = processor.decode(tokens[0], skip_special_tokens=True).strip()
    return texts


@pytest.mark.parametrize(("batch_size", "fast"), [(3, True), (10, False), (64, True)])
def test_every_clip_is_heard_as_it_is_alone(
    model: Any, processor: Any, rows: Rows, alone: dict[int, str], batch_size: int, fast: bool
) -> None:
    assert heard(model, processor, rows, list(range(10)), batch_size=batch_size, fast_decoding=fast) == alone
    assert len(set(alone.values())) > 5


def test_the_order_of_the_rows_changes_no_text(model: Any, processor: Any, rows: Rows, alone: dict[int, str]) -> None:
    assert heard(model, processor, rows, [7, 2, 9, 0, 1]) == {row: alone[row] for row in (7, 2, 9, 0, 1)}


def test_each_row_is_decoded_in_its_own_language(model: Any, processor: Any, rows: Rows) -> None:
    prompts: list[list[int]] = []

    def look(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        ids = options["decoder_input_ids"]
        if ids.shape[1] > 1 and not prompts:
            prompts.extend(ids.tolist())

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    heard(model, processor, rows, list(range(10)), batch_size=10, fast_decoding=False)
    hook.remove()
    languages = [processor.tokenizer.convert_ids_to_tokens(prompt[1]) for prompt in prompts]
    assert languages == [f"<|{row['language']}|>" for row in rows.records]
    assert {tuple(prompt[2:]) for prompt in prompts} == {(50359, 50363)}, "transcribe, without timestamps"


def test_progress_counts_rows_and_the_models_mode_is_put_back(model: Any, processor: Any, rows: Rows) -> None:
    seen: list[int] = []
    for training in (True, False):
        model.train(training)
        list(transcribe(model, processor, rows, [0, 1, 2, 3, 4], SETTINGS, multilingual=True, progress=seen.append))
        assert model.training is training
    assert seen == [4, 5, 4, 5]


def test_no_rows_are_no_work(model: Any, processor: Any, rows: Rows) -> None:
    assert list(transcribe(model, processor, rows, [], SETTINGS, multilingual=True)) == []


def test_an_unreadable_clip_ends_with_its_name_and_without_threads(model: Any, processor: Any, rows: Rows) -> None:
    broken = Rows([*rows.records[:2], rows.records[2] | {"path": "/nowhere/gone.wav"}, *rows.records[3:]])
    with pytest.raises(ManifestError, match=r"/nowhere/gone\.wav: no such file"):
        list(transcribe(model, processor, broken, list(range(10)), SETTINGS, multilingual=True))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("audio")]


@given(st.lists(st.floats(0.1, 30), min_size=1, max_size=40), st.integers(1, 5))
def test_shards_hold_every_row_once_longest_first_and_about_as_much_to_do(durations: list[float], workers: int) -> None:
    rows = Rows([{"duration_s": duration} for duration in durations])
    shards = [shard(rows, rank, workers) for rank in range(workers)]
    assert sorted(row for part in shards for row in part) == list(range(len(durations)))
    for part in shards:
        assert [durations[row] for row in part] == sorted((durations[row] for row in part), reverse=True)
    totals = [sum(durations[row] for row in part) for part in shards]
    assert max(totals) - min(totals) <= max(durations) + 1e-6


def test_settings_reach_generate() -> None:
    arguments = generation_arguments(EvaluationConfig(num_beams=3, max_new_tokens=7), ["en", "es"])
    assert (arguments["num_beams"], arguments["max_new_tokens"]) == (3, 7)
    assert arguments["language"] == ["en", "es"]
    assert arguments["task"] == "transcribe"
    assert arguments["do_sample"] is arguments["return_timestamps"] is False
    assert not {"language", "task"} & generation_arguments(EvaluationConfig(), None).keys()


def test_beams_and_the_longest_transcript_are_kept_to(model: Any, processor: Any, rows: Rows) -> None:
    short = heard(model, processor, rows, [0, 1], max_new_tokens=1)
    assert all(len(processor.tokenizer(text, add_special_tokens=False).input_ids) <= 2 for text in short.values())
    assert heard(model, processor, rows, [0, 1], num_beams=3).keys() == {0, 1}


def test_evaluating_scores_every_row_in_the_order_of_the_split(
    model: Any, processor: Any, rows: Rows, alone: dict[int, str]
) -> None:
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"scorer": Scorer(processor.tokenizer.english_spelling_normalizer), "multilingual": True}
    utterances, summary = evaluate(
        model, processor, rows, SETTINGS, **options, progress=lambda *done: seen.append(done)
    )
    assert [utterance.path for utterance in utterances] == rows["path"]
    assert [utterance.hypothesis for utterance in utterances] == list(alone.values())
    assert [utterance.reference for utterance in utterances] == rows["text"]
    assert summary["utterances"] == 10
    assert 0 < summary["wer"] < 1.5
    assert sorted(summary["languages"]) == ["en", "es"]
    assert seen[-1] == (10, 10)
    _, without = evaluate(model, processor, rows, SETTINGS, **options, bootstrap=0)
    assert "wer_interval" in summary
    assert "wer_interval" not in without


def test_a_model_in_half_precision_hears_the_same(nano: Path, processor: Any, rows: Rows) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(nano, dtype=torch.float32).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        texts = heard(model, processor, rows, [0, 1, 2])
    assert all(texts.values())
