"""Encoder outputs that are kept: computed once, wherever they lie, and with the numbers of those computed anew."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from engine import Run, batch_of, events, job, prepared, run_engine, watched
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from jobs.adapter import attach
from jobs.fast.encoder_outputs import EncoderOutputs, Origin
from jobs.fast.places import Memory, Place
from jobs.train.kept import make_outputs, origin_of
from jobs.train.loop import train
from jobs.train.session import LocalSession
from jobs.train.step import encode_by, forward_loss
from service.errors import StoppedError
from service.spec.job import JobSpec
from service.spec.training import TrainingConfig

CPU = torch.device("cpu")
TRAIN, VAL, STEPS = 13, 5, 21
FROZEN: dict[str, Any] = {"freeze_encoder": True, "epochs": 3, "lr": 0.01, "lora_dropout": 0.2, "eval_steps": 7}
ROW_GB = 4 * 100 * 32 / 1e9
"""An output of `tiny`, in float32."""


def spec_of(tiny: Path, tones: Path, root: Path, sections: dict[str, Any] | None = None, **engine: Any) -> JobSpec:
    return job(tiny, tones, root, {"engine": engine} | (sections or {}), **FROZEN)


def watched_run(spec: JobSpec) -> tuple[Run, list[int]]:
    """A run, and how many clips each call of the encoder heard."""
    with watched(WhisperEncoder) as calls:
        run = Run(spec)
    return run, [len(call.given["input_features"]) for call in calls]


@pytest.fixture(scope="module")
def off(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[int]]:
    """The reference: the encoder runs for every batch."""
    return watched_run(spec_of(tiny, tones, tmp_path_factory.mktemp("off") / "run", keep_encoder="off"))


@pytest.fixture(scope="module")
def kept(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[int]]:
    """The same with what is the default."""
    return watched_run(spec_of(tiny, tones, tmp_path_factory.mktemp("kept") / "run"))


def texts(run: Run, name: str) -> bytes:
    return (run.root / f"evaluation/{name}.jsonl").read_bytes()


def assert_equal(one: Run, other: Run) -> None:
    """To the last bit."""
    assert one.steps("loss") == other.steps("loss")
    assert one.result["training"]["history"] == other.result["training"]["history"]
    mine, theirs = one.adapter(), other.adapter()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def notices(run: Run) -> list[str]:
    return [event["text"] for event in events(run.session, "notice")]


@pytest.mark.setting("engine.keep_encoder", "freeze_encoder")
def test_the_run_is_the_one_in_which_the_encoder_runs_each_time(
    off: tuple[Run, list[int]], kept: tuple[Run, list[int]]
) -> None:
    (reference, _), (run, _) = off, kept
    assert run.steps("loss") == pytest.approx(reference.steps("loss"), rel=1e-5)
    assert run.steps("grad_norm") == pytest.approx(reference.steps("grad_norm"), rel=1e-4)
    mine, theirs = run.adapter(), reference.adapter()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))
    for name in ("base", "tuned"):
        assert texts(run, name) == texts(reference, name)
    assert run.result["training"]["history"] == reference.result["training"]["history"]


@pytest.mark.setting("engine.keep_encoder")
def test_each_clip_is_heard_once_and_again_in_the_proof(
    off: tuple[Run, list[int]], kept: tuple[Run, list[int]]
) -> None:
    assert sum(off[1]) == 3 * TRAIN + (1 + 3 + 1) * VAL, "epochs; the base, three evaluations, the published adapter"
    assert kept[1] == [1] * (TRAIN + VAL) + [VAL], "the proof from files computes everything anew"
    assert notices(kept[0]) == ["encoder outputs of 13 train clips and 5 val clips are kept: 18 in main memory"]
    assert notices(off[0]) == []


@pytest.mark.setting("engine.keep_encoder", "engine.keep_encoder_gb")
@pytest.mark.parametrize(
    ("engine", "where", "heard"),
    [
        ({"keep_encoder": "disk"}, "18 on disk", TRAIN + VAL),
        ({"keep_encoder": "device"}, "18 in main memory", TRAIN + VAL),
        ({"keep_encoder_gb": 10.5 * ROW_GB}, "10 in main memory, 8 on disk", TRAIN + VAL),
        ({"keep_encoder": "host", "keep_encoder_gb": 10.5 * ROW_GB}, "10 in main memory", 10 + 3 * (TRAIN - 5)),
        ({"keep_encoder": "host", "keep_encoder_gb": 0}, None, 3 * TRAIN + 4 * VAL),
    ],
    ids=["disk", "device", "memory, then disk", "memory, then anew", "anew"],
)
def test_wherever_they_lie_the_numbers_are_the_same(
    tiny: Path,
    tones: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: tuple[Run, list[int]],
    engine: dict[str, Any],
    where: str | None,
    heard: int,
) -> None:
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("jobs.train.kept.is_in_memory", lambda folder: False)  # of this machine's /tmp
    run, calls = watched_run(spec_of(tiny, tones, tmp_path / "run", **engine))
    assert_equal(run, kept[0])
    assert sum(calls[:-1]) == heard
    assert notices(run) == ([f"encoder outputs of {_clips(where)} are kept: {where}"] if where else [])
    assert not list(tmp_path.glob("cache/*")), "the file has no name"


def _clips(where: str) -> str:
    return "5 train clips and 5 val clips" if where == "10 in main memory" else "13 train clips and 5 val clips"


def test_a_folder_that_cannot_be_written_costs_time_and_not_the_run(
    tiny: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: tuple[Run, list[int]]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "file/cache"))
    run, calls = watched_run(spec_of(tiny, tones, tmp_path / "run", keep_encoder="disk"))
    assert_equal(run, kept[0])
    assert sum(calls[:-1]) == 3 * TRAIN + 4 * VAL
    assert notices(run) == [f"no encoder output is kept; {tmp_path}/file/cache: Not a directory"]


@pytest.mark.parametrize(
    ("sections", "settings", "heard", "why"),
    [
        ({}, {"freeze_encoder": False}, 3 * TRAIN + 5 * VAL, "training.freeze_encoder is false"),
        ({"augment": {"gain_db": [-6, 6]}}, {}, 3 * TRAIN + 2 * VAL, "augment varies the clips"),
        ({"augment": {"speed": [0.9, 1.1]}}, {}, 3 * TRAIN + 2 * VAL, "augment varies the clips"),
        ({"augment": {"noise_prob": 0.5}}, {}, 3 * TRAIN + 2 * VAL, "augment varies the clips"),
        ({"augment": {"mask_time_prob": 0.1}}, {}, 3 * TRAIN + 2 * VAL, "augment varies the clips"),
        ({"augment": {"mask_feature_prob": 0.1}}, {}, 3 * TRAIN + 2 * VAL, "augment varies the clips"),
    ],
    ids=["trained", "gain", "speed", "noise", "time", "feature"],
)
def test_what_differs_from_epoch_to_epoch_is_not_kept(
    tiny: Path,
    tones: Path,
    tmp_path: Path,
    sections: dict[str, Any],
    settings: dict[str, Any],
    heard: int,
    why: str,
) -> None:
    spec = job(tiny, tones, tmp_path / "run", {"engine": {"keep_encoder": "host"}} | sections, **FROZEN | settings)
    run, calls = watched_run(spec)
    assert sum(calls) == heard
    assert notices(run)[0] == f"engine.keep_encoder: no encoder outputs of training clips are kept: {why}"


@pytest.mark.parametrize("metric", ["wer", "loss"])
def test_evaluations_take_what_is_kept(tiny: Path, tones: Path, tmp_path: Path, metric: str) -> None:
    runs = {}
    for name in ("auto", "off"):
        sections = {"evaluation": {"metric": metric, "max_new_tokens": 6, "num_beams": 2, "bootstrap": 0}}
        spec = job(
            tiny, tones, tmp_path / name, sections | {"engine": {"keep_encoder": name}},
            **FROZEN | {"epochs": 1, "eval_steps": 2, "bf16": metric == "loss"},
        )  # fmt: skip
        runs[name] = watched_run(spec)
    (run, calls), (reference, every) = runs["auto"], runs["off"]
    assert sum(calls) == TRAIN + 2 * VAL
    assert sum(every) == TRAIN + 6 * VAL
    for mine, theirs in zip(run.result["training"]["history"], reference.result["training"]["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2 if metric == "loss" else 1e-9)


def test_trainings_of_one_process_share_what_is_handed_to_them(tiny: Path, tones: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny, tones, tmp_path / "first")
    task = prepared(spec)
    splits = {"train": task.train, "val": task.val}
    shared = make_outputs(spec, origin_of(spec, splits, None, CPU, "no"), CPU)
    counts, losses = [], []
    for outputs in (shared, shared, None):
        shutil.rmtree(tmp_path / "first/checkpoints", ignore_errors=True)
        shutil.rmtree(tmp_path / "first/adapter", ignore_errors=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        session = LocalSession()
        with watched(WhisperEncoder) as calls:
            train(task, session, outputs)
        counts.append(sum(len(call.given["input_features"]) for call in calls))
        losses.append([event["loss"] for event in events(session, "step")])
    assert counts == [TRAIN + 2 * VAL, VAL, TRAIN + 2 * VAL], "and in each of them once more in the proof"
    assert losses[0] == losses[1] == losses[2]
    other = make_outputs(spec, origin_of(spec, splits, None, CPU, "bf16"), CPU)
    with pytest.raises(ValueError, match="were handed to a training that needs"):
        train(task, LocalSession(), other)


def outputs_of(precision: str, *places: Place) -> EncoderOutputs:
    return EncoderOutputs(Origin("base", None, "sdpa", precision, "cpu", (("train", "sha"),)), CPU, list(places))


def memory(limit: int = 10**9) -> Memory:
    return Memory("in main memory", CPU, limit)


@pytest.mark.parametrize("freeze", [{}, {"modules_to_save": ["embed_tokens"]}], ids=["adapters", "saved in full"])
def test_a_row_has_the_same_bits_in_every_batch(tiny: Path, tones: Path, freeze: dict[str, Any]) -> None:
    """BLAS rounds differently for other shapes, so that a plain batch of other rows has other bits."""
    plain = WhisperForConditionalGeneration.from_pretrained(tiny).eval()
    features = batch_of(tiny, tones / "train.csv", TRAIN).features_BMF
    reference = encode_by(plain)(features)
    model, _ = attach(
        WhisperForConditionalGeneration.from_pretrained(tiny), TrainingConfig(freeze_encoder=True, **freeze)
    )
    for size in (1, 2, 3, 8, TRAIN):
        found = []
        for first in range(0, TRAIN, size):
            rows = list(range(first, min(TRAIN, first + size)))
            found.append(outputs_of("no").of("train").look_up(rows).complete(features[rows], encode_by(model.train())))
        once = torch.cat([encode_by(plain)(features[row : row + 1]) for row in range(TRAIN)])
        assert torch.equal(torch.cat(found), once)
    torch.testing.assert_close(once, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_what_autocast_makes_of_them(tiny: Path, tones: Path, precision: str) -> None:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    torch.manual_seed(0)
    settings = TrainingConfig(freeze_encoder=True, lora_dropout=0.0, use_dora=True)
    model, _ = attach(WhisperForConditionalGeneration.from_pretrained(tiny), settings)
    rows, found = [0, 1, 2, 3], {}
    batch = batch_of(tiny, tones / "train.csv", 4)
    split = outputs_of(precision, memory()).of("train")
    with torch.autocast("cpu", dtype=kind):
        reference = encode_by(model)(batch.features_BMF)
        assert reference.dtype == torch.float32, "the encoder's last layer norm"
        half = split.look_up(rows).complete(batch.features_BMF, encode_by(model))
        assert half.dtype == kind
        again = split.look_up(rows)
        assert again.missing == []
        assert torch.equal(again.complete(torch.empty(0), encode_by(model)), half)
        error = float((half.float() - reference).abs().max() / reference.abs().max())
        assert error <= 2 * torch.finfo(kind).eps
        for name, heard in (("plain", None), ("kept", again)):
            model.zero_grad()
            one = type(batch)(batch.features_BMF, batch.inputs_BT, batch.labels_BT, rows, heard)
            loss = forward_loss(model, one, CPU, freeze_encoder=True)
            loss.backward()
            grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
            found[name] = (float(loss.detach()), grads)
    assert found["kept"][0] == pytest.approx(found["plain"][0], rel=1e-3)
    for name, gradient in found["plain"][1].items():
        scale = float(gradient.abs().max())
        assert float((found["kept"][1][name] - gradient).abs().max()) <= 0.05 * scale + 1e-6, name


def test_outputs_that_were_first_heard_in_inference_mode_can_be_trained_on(tiny: Path, tones: Path) -> None:
    torch.manual_seed(0)
    model, _ = attach(WhisperForConditionalGeneration.from_pretrained(tiny), TrainingConfig(freeze_encoder=True))
    batch = batch_of(tiny, tones / "train.csv", 2)
    split = outputs_of("no", memory()).of("train")
    with torch.inference_mode():
        split.look_up([0, 1]).complete(batch.features_BMF, encode_by(model))
    one = type(batch)(torch.empty(0), batch.inputs_BT, batch.labels_BT, [0, 1], split.look_up([0, 1]))
    forward_loss(model, one, CPU, freeze_encoder=True).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_threads_get_whole_rows_and_each_is_kept_once() -> None:
    outputs = outputs_of("no", memory(40 * 4096 * 4), memory(40 * 4096 * 4))
    split = outputs.of("train")

    def encode(features_NMF: Tensor) -> Tensor:
        return features_NMF[:, :, :1] + torch.zeros(1, 1, 4096)

    def ask(turn: int) -> bool:
        rows = torch.randperm(100, generator=torch.Generator().manual_seed(turn))[:16].tolist()
        heard = split.look_up(rows)
        features = torch.tensor([float(rows[at]) for at in heard.missing]).reshape(-1, 1, 1)
        got = heard.complete(features, encode)
        return torch.equal(got, torch.tensor(rows).float().reshape(-1, 1, 1).expand(-1, 1, 4096))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))
    assert outputs.rows() == {"train": 80}
    assert [place.rows for place in outputs.places] == [40, 40]


def test_a_stopped_run_that_keeps_goes_on_to_the_same_bits(
    tiny: Path, tones: Path, tmp_path: Path, kept: tuple[Run, list[int]]
) -> None:
    spec = spec_of(tiny, tones, tmp_path / "run")
    first = LocalSession()
    first.stopping = lambda: len(events(first, "step")) >= 10  # type: ignore[method-assign]
    task = prepared(spec)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(StoppedError):
        train(task, first)
    result, second = run_engine(spec)
    losses = [event["loss"] for session in (first, second) for event in events(session, "step")]
    assert len(losses) == STEPS
    assert losses == kept[0].steps("loss")
    assert result["training"]["history"] == kept[0].result["training"]["history"]


@pytest.mark.gpu
@pytest.mark.setting("engine.keep_encoder", "engine.keep_encoder_gb")
@pytest.mark.parametrize(
    ("engine", "where"),
    [
        ({"keep_encoder_gb": 1}, "18 in the GPU's memory"),
        ({"keep_encoder": "device", "keep_encoder_gb": 1}, "18 in the GPU's memory"),
        ({"keep_encoder": "host"}, "18 in main memory"),
        ({"keep_encoder": "disk"}, "18 on disk"),
        ({}, "clips are kept"),
    ],
)
def test_on_a_gpu_the_run_is_the_one_in_which_the_encoder_runs_each_time(
    tiny: Path, tones: Path, tmp_path: Path, engine: dict[str, Any], where: str
) -> None:
    runs = {}
    for name, each in (("kept", engine), ("off", {"keep_encoder": "off"})):
        sections = {"engine": each, "resources": {"gpus_per_worker": 1}}
        runs[name] = watched_run(job(tiny, tones, tmp_path / name, sections, **FROZEN | {"lora_dropout": 0.0}))
    (run, calls), (reference, _) = runs["kept"], runs["off"]
    assert run.steps("loss") == pytest.approx(reference.steps("loss"), rel=0.02)
    assert sum(calls) == TRAIN + 2 * VAL, "the first epoch, the validation set, and that again in the proof"
    assert where in notices(run)[0]
