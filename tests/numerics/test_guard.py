"""The guard hears what transformers hears, with timestamps, and refuses models that were broken on purpose."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from checkpoints import FORMS, write_checkpoint_of
from datasets import Dataset
from engine import fill_adapters, job, read_lines, write_csv
from torch import Tensor

from jobs.adapter import attach
from jobs.audio import read_audio
from jobs.guard.faults import KINDS
from jobs.guard.hear import Heard, Listener, Piece
from jobs.guard.stage import guard
from jobs.manifest.rows import read_rows
from jobs.model import Whisper, load_whisper
from jobs.prepare import prepare, split_file
from jobs.publish import promotion_reasons
from jobs.train.checkpoint import adapter_state, save_adapter
from service.errors import InputLostError
from service.spec.job import JobSpec
from service.spec.sections import EvaluationConfig

pytestmark = pytest.mark.slow

RATE_HZ = 16_000
SETTINGS = EvaluationConfig(batch_size=4, max_new_tokens=40, num_beams=3)
BETTER = {"base": {"wer": 0.5}, "tuned": {"wer": 0.1}}


@pytest.fixture(scope="module")
def clips(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with guard.csv: five short clips in two languages, two long ones, silence and noise."""
    folder = tmp_path_factory.mktemp("guard")
    said = list(read_rows(str(manifest / "val.csv"), "en"))[:5]
    rows: list[tuple[Any, ...]] = [(row.path, row.text, row.language, "") for row in said]
    pause = np.zeros(6 * RATE_HZ, np.float32)
    for name, chosen in (("long", said), ("longer", [*said, *said[:4]])):
        samples = np.concatenate([part for row in chosen for part in (read_audio(row.path), pause)])
        assert len(samples) > 30 * RATE_HZ
        soundfile.write(folder / f"{name}.wav", samples, RATE_HZ)
        rows.append((f"{name}.wav", " ".join(row.text for row in chosen), "en", ""))
    soundfile.write(folder / "silence.wav", np.zeros(3 * RATE_HZ), RATE_HZ)
    soundfile.write(folder / "noise.wav", 0.01 * np.random.default_rng(0).standard_normal(3 * RATE_HZ), RATE_HZ)
    rows += [("silence.wav", "", "en", "true"), ("noise.wav", "", "en", "true")]
    write_csv(folder / "guard.csv", rows, ("path", "text", "language", "no_speech"))
    return folder


@pytest.fixture(scope="module")
def prepared(nano: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    """A job on nano Whisper whose guard's rows are checked and stored."""
    root = tmp_path_factory.mktemp("prepared") / "run"
    sections = {"guard": {"csv": str(clips / "guard.csv")}, "evaluation": {"max_new_tokens": 40, "batch_size": 4}}
    spec = job(nano, clips, root, sections)
    prepare(spec, spec.root, {"guard": str(clips / "guard.csv")}, str(nano))
    return spec


@pytest.fixture
def spec(prepared: JobSpec, tmp_path: Path) -> JobSpec:
    """That job with a root of its own."""
    shutil.copytree(prepared.root, tmp_path / "run")
    training = prepared.training.model_copy(update={"outdir": str(tmp_path / "run")})
    return prepared.model_copy(update={"training": training})


@pytest.fixture(scope="module")
def rows(prepared: JobSpec) -> Any:
    return Dataset.from_file(f"{prepared.root}/{split_file('guard')}")


def hear(model: str | Path, rows: Any, **settings: Any) -> list[Heard]:
    whisper = load_whisper(str(model))
    options = SETTINGS.model_copy(update=settings)
    return Listener(whisper.model, whisper.processor, options, multilingual=whisper.multilingual).hear(rows)


Alone = tuple[str, list[tuple[float, float]]]
"""A transcript and the times of its segments."""


class TestListening:
    """Against transformers' own generate(), one clip at a time."""

    @pytest.fixture(scope="class")
    def alone(self, nano: Path, rows: Any) -> list[Alone]:
        whisper = load_whisper(str(nano))
        return [self.transcript(whisper, row) for row in rows]

    def transcript(self, whisper: Whisper, row: dict[str, Any]) -> Alone:
        features = whisper.processor.feature_extractor(
            read_audio(row["path"]), sampling_rate=RATE_HZ, return_tensors="pt", truncation=row["duration_s"] <= 30,
            padding="max_length" if row["duration_s"] <= 30 else "longest",
        ).input_features  # fmt: skip
        options = {"language": row["language"], "task": "transcribe", "max_new_tokens": 40}
        found = whisper.model.generate(features, return_timestamps=True, return_segments=True, **options)
        (tokens,), (segments,) = found["sequences"], found["segments"]
        text = whisper.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return text, [(round(float(s["start"]), 2), round(float(s["end"]), 2)) for s in segments]

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_a_clip_is_heard_as_it_is_alone(self, nano: Path, rows: Any, alone: list[Alone], batch_size: int) -> None:
        heard = hear(nano, rows, batch_size=batch_size)
        assert [item.row for item in heard] == list(range(len(rows)))
        for item, (text, times) in zip(heard, alone, strict=True):
            assert item.text == text
            if len(times) > 1:  # transformers makes one segment of a window begin at the window's begin
                assert [(piece.start_s, piece.end_s) for piece in item.pieces] == times
        assert max(piece.end_s or 0 for piece in heard[5].pieces) > 30, "nothing was heard behind the first window"
        assert [heard[row].text for row in (7, 8)] == ["", ""]
        assert not any(item.stuck for item in heard)

    def test_progress_counts_every_row_once(self, nano: Path, rows: Any) -> None:
        whisper, seen = load_whisper(str(nano)), list[int]()
        listener = Listener(whisper.model, whisper.processor, SETTINGS, multilingual=True)
        listener.hear(rows, progress=seen.append)
        assert seen == [2, 6, 9]

    @pytest.mark.parametrize("name", FORMS)
    def test_checkpoints_of_every_form_are_listened_to(self, name: str, tmp_path: Path, tones: Path) -> None:
        base = write_checkpoint_of(FORMS[name], tmp_path / "base")
        soundfile.write(tmp_path / "long.wav", np.tile(read_audio(str(tones / "03.wav")), 6), RATE_HZ)
        found = [
            {"path": str(path), "language": "en", "duration_s": soundfile.info(path).duration}
            for path in (tones / "00.wav", tmp_path / "long.wav", tones / "01.wav")
        ]
        assert found[1]["duration_s"] > 3  # of a window of 2 s
        heard = hear(base, Dataset.from_list(found), max_new_tokens=8)
        assert len(heard) == 3
        assert all(item.pieces or item.stuck for item in heard)

    def test_tokens_are_parted_at_timestamps(self, nano: Path) -> None:
        whisper = load_whisper(str(nano))
        listener = Listener(whisper.model, whisper.processor, SETTINGS, multilingual=True)
        ids = whisper.processor.tokenizer.convert_tokens_to_ids
        end, zero = ids("<|endoftext|>"), ids("<|notimestamps|>") + 1
        (word,) = whisper.processor.tokenizer(" light", add_special_tokens=False).input_ids
        prompt = [ids("<|startoftranscript|>"), ids("<|en|>"), ids("<|transcribe|>")]

        def parted(*tokens: int) -> list[Piece]:
            return list(listener.pieces([*prompt, *tokens, end, end]))

        assert parted() == []
        assert parted(zero, zero + 50) == []
        assert parted(zero, word, zero + 50) == [Piece(0.0, 1.0, " light")]
        assert parted(zero + 5, word, word) == [Piece(0.1, None, " light light")]
        assert parted(zero, word, zero + 50, zero + 60, word, zero + 1500) == [
            Piece(0.0, 1.0, " light"), Piece(1.2, 30.0, " light"),
        ]  # fmt: skip
        assert parted(zero, word, zero + 50, zero + 50, word)[1] == Piece(1.0, None, " light")
        assert parted(word) == [Piece(0.0, None, " light")]

    def test_a_model_that_never_comes_to_the_end_of_a_long_clip_is_stopped(
        self, nano: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whisper = load_whisper(str(nano))
        tokenizer, forward = whisper.processor.tokenizer, whisper.model.forward
        zero = tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1
        (word,) = tokenizer(" light", add_special_tokens=False).input_ids
        said = [zero, word, zero + 2, zero + 2, tokenizer.eos_token_id]  # every window ends after 0.04 s

        def short_of_breath(*arguments: Any, **options: Any) -> Any:
            output = forward(*arguments, **options)
            step = max(0, options["past_key_values"].get_seq_length() - 3)
            output.logits.fill_(-50.0)
            output.logits[:, -1, said[min(step, 4)]] = 50.0
            return output

        monkeypatch.setattr(whisper.model, "forward", short_of_breath)
        heard = Listener(whisper.model, whisper.processor, SETTINGS, multilingual=True).hear(rows)
        assert [item.stuck for item in heard] == [row["duration_s"] > 30 for row in rows]
        assert heard[0].pieces == (Piece(0.0, 0.04, " light"),)


def direction(model: Any, token: int) -> Tensor:
    """What, added to the decoder's last bias, raises that token's logit by one at every step."""
    row: Tensor = model.proj_out.weight[token].detach()
    return row / row.norm() ** 2


def only_a_word(model: Any, tokenizer: Any) -> Tensor:
    return 40 * direction(model, tokenizer(" light", add_special_tokens=False).input_ids[0])


def never_ends(model: Any, tokenizer: Any) -> Tensor:
    return -20 * direction(model, tokenizer.eos_token_id)


def late_times(model: Any, tokenizer: Any) -> Tensor:
    return 40 * direction(model, tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1501)


def a_trifle(model: Any, tokenizer: Any) -> Tensor:
    return 0.05 * direction(model, tokenizer(" light", add_special_tokens=False).input_ids[0])


def publish_merged(spec: JobSpec, change: Callable[[Any, Any], Tensor]) -> None:
    """Leave a merged/ that differs from the base by a change of the decoder's last bias."""
    whisper = load_whisper(spec.training.base_model)
    with torch.no_grad():
        whisper.model.model.decoder.layer_norm.bias += change(whisper.model, whisper.processor.tokenizer)
    whisper.model.save_pretrained(f"{spec.root}/merged")
    whisper.processor.save_pretrained(f"{spec.root}/merged")


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (only_a_word, {"text_on_silence", "loops", "bad_timestamps"}),
        (never_ends, {"text_on_silence", "bad_timestamps"}),
        (late_times, {"bad_timestamps"}),
    ],
)
def test_a_model_broken_on_purpose_is_refused_with_the_reasons(
    spec: JobSpec, change: Callable[[Any, Any], Tensor], kinds: set[str]
) -> None:
    publish_merged(spec, change)
    result = guard(spec, spec.root)
    assert [result["base"][kind] for kind in KINDS] == [0, 0, 0]
    assert {kind for kind in KINDS if result["regressed"][kind]} >= kinds
    reasons = promotion_reasons(BETTER | {"guard": result})
    for kind in kinds:
        assert any(KINDS[kind] in reason for reason in reasons), reasons
    assert any("its WER on the guard's clips" in reason for reason in reasons)
    assert {shown["kind"] for shown in result["regressions"]} >= kinds
    lines = read_lines(Path(spec.root) / "evaluation/guard_tuned.jsonl")
    for kind in KINDS:
        assert sum(kind in line["faults"] for line in lines) == result["tuned"][kind]


@pytest.mark.setting("guard.csv")
def test_a_harmless_one_is_promoted_and_every_clip_of_both_is_kept(spec: JobSpec, rows: Any) -> None:
    publish_merged(spec, a_trifle)
    seen: list[tuple[str, int, int]] = []
    result = guard(spec, spec.root, lambda *told: seen.append(told))
    assert result["reasons"] == result["regressions"] == []
    assert promotion_reasons(BETTER | {"guard": result}) == []
    assert result["utterances"] == 9
    assert set(result["base"]["languages"]) == {"en", "es"}
    assert {name: done for name, done, _ in seen} == {"base": 9, "tuned": 9}
    for name in ("base", "tuned"):
        lines = read_lines(Path(spec.root) / f"evaluation/guard_{name}.jsonl")
        assert [line["path"] for line in lines] == rows["path"][:]
        assert [line["reference"] for line in lines] == rows["text"][:]
        assert len(lines[5]["segments"]) > 1
        assert lines[5]["segments"][-1][1] > 30
        assert lines[7]["hypothesis"] == ""


@pytest.mark.parametrize(("use_dora", "scale", "promoted"), [(False, 0.5, False), (True, 1e-4, True)])
def test_without_a_merged_model_the_adapter_is_listened_to(
    spec: JobSpec, scale: float, *, use_dora: bool, promoted: bool
) -> None:
    training = spec.training.model_copy(update={"merge_lora": False, "use_dora": use_dora})
    spec = spec.model_copy(update={"training": training})
    model, _ = attach(load_whisper(training.base_model).model, training)
    fill_adapters(model, scale)
    save_adapter(Path(spec.root) / "adapter", model, adapter_state(model))
    assert (guard(spec, spec.root)["reasons"] == []) is promoted


def test_a_model_that_has_gone_is_named(spec: JobSpec) -> None:
    with pytest.raises(InputLostError, match="merged"):
        guard(spec, spec.root)
