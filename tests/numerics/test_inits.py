"""Every initialisation is exact: what is published is the trained model, on the untouched base, also after a resume."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from engine import batch_of, job, keeping, logits_of, merge_of, prepared, run_engine, saved_adapter
from gloo import train_in_processes
from peft import PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from test_resume import assert_same_run, stop_after
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from jobs import inits
from jobs.adapter import ADAPTER_NAME, lora_config, lora_layers
from jobs.batches import Batch, label_tokens
from jobs.convert import save_published
from jobs.init_data import InitClips, eva_directions, prepare_corda
from jobs.train.checkpoint import adapter_state
from jobs.train.loop import Trainer, train
from jobs.train.session import LocalSession
from jobs.train.step import forward_loss
from service.errors import InputError, JobFailedError, SpecError
from service.plan import make_plan
from service.spec.job import JobSpec
from service.spec.training import TrainingConfig
from service.storage import Storage

NEUTRAL: list[Any] = [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "eva"]
CASES: dict[str, dict[str, Any]] = {
    f"{init}, {'DoRA' if use_dora else 'LoRA'}": {"lora_init": init, "use_dora": use_dora}
    for init in [*NEUTRAL, False, "mica"]
    for use_dora in (False, True)
    if (init, use_dora) != ("mica", True)
}
CASES["eva that leaves modules out"] = {"lora_init": "eva", "lora_r": 1, "lora_alpha": 3}
DOUBLED = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")

BOUND = 1e-5
"""Largest difference of logits of up to 10 in size; 1e-4 is what a merge may cost."""

pytestmark = pytest.mark.filterwarnings("ignore:.*lowrank", "ignore:`init_lora_weights` is")


def spec_of(tiny: Path, tones: Path, root: Path, **settings: Any) -> JobSpec:
    defaults: dict[str, Any] = {
        "lora_r": 4,
        "lora_alpha": 12,
        "lora_alpha_pattern": {"decoder.*k_proj": 5},
        "modules_to_save": ["embed_tokens"],
        "per_dev_batch": 4,
        "lr": 1e-2,
        "save_steps": 2,
    }
    if settings["lora_init"] != "eva":
        defaults["lora_rank_pattern"] = {"fc1": 6, "encoder.*q_proj": 2}
    return job(tiny, tones, root, **(defaults | settings))


def base_model(checkpoint: Path) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


class Watched(Trainer):
    """A trainer that tells what its model says before the first step, and after the last one."""

    batch: Any
    began: Tensor
    began_published: Tensor
    ended: Tensor
    tied: bool

    def _prepare_training(self) -> None:
        super()._prepare_training()
        self.began = logits_of(self.model, self.batch)
        start = self.storage.local().with_name("start")
        save_published(start, self.model, adapter_state(self.model), self.before)
        plain = PeftModel.from_pretrained(base_model(Path(self.settings.base_model)), start)
        self.began_published = logits_of(plain, self.batch)

    def _score_saved(self) -> dict[str, Any]:
        self.ended = logits_of(self.model, self.batch)
        whisper = self.model.get_base_model()
        self.tied = whisper.proj_out.weight is whisper.model.decoder.embed_tokens.weight
        return super()._score_saved()


@dataclass(frozen=True)
class Run:
    """A run of the training stage with what was watched in it."""

    spec: JobSpec
    result: dict[str, Any]
    trainer: Watched
    batch: Any
    base: Tensor

    @property
    def root(self) -> Path:
        return Path(self.spec.root)

    @property
    def init(self) -> Any:
        return self.spec.training.lora_init


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run of that case."""
    before = sha256(tiny)
    spec = spec_of(tiny, tones, tmp_path_factory.mktemp("inits") / "run", **CASES[request.param])
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Watched(prepared(keeping(spec, 100)), LocalSession())
    trainer.batch = batch_of(tiny, tones / "val.csv", 5)
    result = trainer.run()
    assert sha256(tiny) == before, "the base on disk"
    return Run(spec, result, trainer, trainer.batch, logits_of(base_model(tiny), trainer.batch))


def sha256(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def test_training_begins_at_the_base_with_every_init_but_false(run: Run) -> None:
    assert (difference(run.trainer.began, run.base) <= BOUND) is (run.init is not False)
    assert difference(run.trainer.began_published, run.trainer.began) <= BOUND


def test_what_is_published_is_the_trained_model_on_the_untouched_base(run: Run) -> None:
    assert difference(run.trainer.ended, run.base) > 0.5, "a run that has learned next to nothing"
    loaded = PeftModel.from_pretrained(base_model(Path(run.spec.training.base_model)), run.root / "adapter")
    assert difference(logits_of(loaded, run.batch), run.trainer.ended) <= BOUND
    assert run.trainer.tied


def test_so_is_the_merged_checkpoint(run: Run) -> None:
    result = merge_of(run.spec)
    assert result["max_logit_difference_after_cast"] <= BOUND
    merged = base_model(run.root / "merged")
    assert difference(logits_of(merged, run.batch), run.trainer.ended) <= BOUND
    assert merged.proj_out.weight is merged.model.decoder.embed_tokens.weight
    assert result["artifact"]["identical"] == 1.0


def test_a_resumed_run_begins_from_what_was_kept_and_ends_where_the_other_ended(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inits, "make", lambda *arguments: pytest.fail("the state was made again"))
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = train(stop_after(run.spec, 2, tmp_path / "run"), LocalSession())
    assert_same_run(run.root, tmp_path / "run")
    assert resumed["adapter"] == run.result["adapter"]
    assert resumed["tuned"] == run.result["tuned"]


def test_scalings_stay_and_ranks_double_where_the_base_was_changed(run: Run) -> None:
    raw, published = config_of(run.root / "checkpoints/checkpoint-4/adapter"), config_of(run.root / "adapter")
    factor = 2 if run.init in DOUBLED else 1
    assert (raw["init_lora_weights"], published["init_lora_weights"]) == (run.init, True)
    assert (published["r"], published["lora_alpha"]) == (factor * raw["r"], factor * raw["lora_alpha"])
    loaded = PeftModel.from_pretrained(base_model(Path(run.spec.training.base_model)), run.root / "adapter")
    layers = dict(lora_layers(loaded))
    assert layers.keys() == run.trainer.before.keys()
    for name, start in run.trainer.before.items():
        assert layers[name].scaling[ADAPTER_NAME] == start.scale
        assert layers[name].r[ADAPTER_NAME] == factor * len(start.a_RI)
    state, last = saved_adapter(run.root / "adapter"), saved_adapter(run.root / "checkpoints/checkpoint-4/adapter")
    assert state.keys() == last.keys()
    kept = [name for name in state if "lora_A" not in name and "lora_B" not in name]
    assert any("magnitude" in name for name in kept) is run.spec.training.use_dora
    assert all(torch.equal(state[name], last[name]) for name in kept)


def test_the_report_says_what_is_adapted(run: Run) -> None:
    report = run.result["adapter"]
    left_out = report["without_adapter"]
    assert report["modules"] == len(run.trainer.before) == 32 - len(left_out)
    assert sum(part["adapted"] for part in report["coverage"].values()) == report["modules"] + 1
    assert report["coverage"]["saved in full"] == {"adapted": 1, "changed": 1}
    assert (report["zero_updates"], report["saved"]) == (0, 1)
    ranks = [len(start.a_RI) for start in run.trainer.before.values()]
    assert report["ranks"] == [min(ranks), max(ranks)]
    assert bool(left_out) is (run.spec.training.lora_r == 1)
    if run.init == "eva":
        assert sum(ranks) == 32 * run.spec.training.lora_r, "eva moves ranks and adds none"
        assert max(ranks) > run.spec.training.lora_r
    else:
        plan = make_plan(run.spec).adapter
        state = saved_adapter(run.root / "adapter")
        state.pop("base_model.model.proj_out.weight")  # the embedding's own matrix
        assert plan is not None
        assert plan.trainable_parameters == report["trainable_parameters"]
        assert plan.published_parameters == sum(tensor.numel() for tensor in state.values())


# PEFT as the witness: the same factors, ranks, scalings and base weights as its own way gives.


def clips_of(tones: Path, tiny: Path, count: int = 13) -> InitClips:
    whole = batch_of(tiny, tones / "train.csv", count)

    def read(rows: list[int]) -> Batch:
        longest = int((whole.labels_BT[rows] >= 0).nonzero()[:, 1].max()) + 1
        return Batch(whole.features_BMF[rows], whole.inputs_BT[rows, :longest], whole.labels_BT[rows, :longest], rows)

    return InitClips(list(range(count)), read, torch.device("cpu"), freeze_encoder=False)


def began(tiny: Path, tones: Path, folder: Path, training: TrainingConfig) -> Any:
    """A model with adapters as a run gets it."""
    torch.manual_seed(0)
    storage = Storage(str(folder / "root"))
    return inits.begin(base_model(tiny), training, storage, 0, lambda: clips_of(tones, tiny))


def settings_of(init: Any, use_dora: bool = False, **more: Any) -> TrainingConfig:
    settings: dict[str, Any] = {"lora_r": 4, "lora_rank_pattern": {"fc1": 6}, "lora_alpha_pattern": {"q_proj": 9}}
    return TrainingConfig(lora_init=init, use_dora=use_dora, **(settings | more))


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "mica"])
def test_factors_magnitudes_and_base_are_those_of_peft(
    tiny: Path, tones: Path, tmp_path: Path, init: str, use_dora: bool
) -> None:
    if init == "mica" and use_dora:
        pytest.skip("PEFT has no such thing")
    training = settings_of(init, use_dora)
    ours = began(tiny, tones, tmp_path, training)
    theirs = base_model(tiny)
    config = lora_config(training, inits.plan_of(theirs, training))
    config.init_lora_weights = init
    if init == "corda":
        prepare_corda(theirs, config, clips_of(tones, tiny))
        config.corda_config = CordaConfig()
    theirs = get_peft_model(theirs, config)
    one, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert one.keys() == other.keys()
    for name, parameter in one.items():
        assert parameter.requires_grad == other[name].requires_grad, name
        if "lora_A" in name or "lora_B" in name:
            assert torch.equal(parameter, other[name]), name
        else:
            assert difference(parameter, other[name]) <= 2e-6, name
    before = dict(base_model(tiny).named_parameters())
    changed = sum(
        difference(layer.base_layer.weight, before[f"{name.removeprefix('base_model.model.')}.weight"]) > 0.01
        for name, layer in lora_layers(ours)
    )
    assert changed == (0 if init == "mica" else 32)


@pytest.mark.parametrize("rank", [1, 4])
def test_ranks_scalings_and_factors_of_eva_are_those_of_peft(
    tiny: Path, tones: Path, tmp_path: Path, rank: int
) -> None:
    training = settings_of("eva", lora_r=rank, lora_rank_pattern=None)
    ours = began(tiny, tones, tmp_path, training)
    theirs = base_model(tiny)
    config = lora_config(training, inits.plan_of(theirs, training))
    directions = eva_directions(theirs, config, clips_of(tones, tiny))
    theirs = get_peft_model(theirs, config)
    names = {f"base_model.model.{name}": a for name, a in directions.items()}
    initialize_lora_eva_weights(theirs, eva_state_dict=names)
    one, other = dict(lora_layers(ours)), dict(lora_layers(theirs))
    assert one.keys() == other.keys()
    assert (len(one) < 32) is (rank == 1)
    for name, layer in one.items():
        assert torch.equal(layer.lora_A[ADAPTER_NAME].weight, other[name].lora_A[ADAPTER_NAME].weight)
        assert not layer.lora_B[ADAPTER_NAME].weight.any()
        assert layer.r == other[name].r
        assert layer.scaling == other[name].scaling
        assert layer.lora_alpha == other[name].lora_alpha


def test_eva_finds_the_main_directions_of_a_layers_inputs(tiny: Path, tones: Path) -> None:
    model, clips = base_model(tiny), clips_of(tones, tiny)
    training = settings_of("eva", lora_rank_pattern=None)
    found = eva_directions(model, lora_config(training, inits.plan_of(model, training)), clips)
    for name in ("model.encoder.layers.1.fc2", "model.decoder.layers.1.self_attn.q_proj"):
        seen: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_hook(lambda layer, given, out, to=seen: to.append(given[0]))
        with torch.no_grad():
            for batch in clips.singly():
                model(input_features=batch.features_BMF, decoder_input_ids=batch.inputs_BT)
                seen[-1] = seen[-1][batch.labels_BT >= 0] if "decoder" in name else seen[-1].flatten(0, 1)
        hook.remove()
        rows = torch.cat(seen)
        exact = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[: len(found[name])]
        # How much of each exact direction lies in what was found.
        held = (exact @ found[name].T.to(exact)).norm(dim=1)
        assert float(held[0]) > 0.99, name
        assert float(held.mean()) > 0.9, name


def test_lora_ga_begins_along_the_gradient_of_the_loss(tiny: Path, tones: Path, tmp_path: Path) -> None:
    training, name = settings_of("lora_ga"), "model.decoder.layers.0.fc2"
    ours = began(tiny, tones, tmp_path, training)
    layer = dict(lora_layers(ours))[f"base_model.model.{name}"]
    base, clips = base_model(tiny), clips_of(tones, tiny)
    weight = base.get_submodule(name).weight
    for batch in clips.singly():
        loss = forward_loss(base, batch, clips.device, freeze_encoder=False)
        (loss / label_tokens([batch]) / len(clips.rows)).backward()
    u, _, v = torch.linalg.svd(weight.grad)
    a, b = layer.lora_A[ADAPTER_NAME].weight.detach(), layer.lora_B[ADAPTER_NAME].weight.detach()
    assert float((v[:4] @ a.T).norm(dim=1).min()) > 0.99, "A spans the gradient's first directions of the inputs"
    assert float((u[:, 4:8].T @ (b / b.norm(dim=0))).norm(dim=1).min()) > 0.9, "and B the next ones of the outputs"


def test_a_module_without_a_gradient_stops_lora_ga(tiny: Path, tones: Path, tmp_path: Path) -> None:
    clips = clips_of(tones, tiny)
    frozen = InitClips(clips.rows, clips.read, clips.device, freeze_encoder=True)
    storage = Storage(str(tmp_path / "root"))
    with pytest.raises(JobFailedError, match=r"lora_ga has no gradient for model\.encoder"):
        inits.begin(base_model(tiny), settings_of("lora_ga"), storage, 0, lambda: frozen)
    assert not storage.exists(inits.INITIAL)


def test_eva_wants_enough_tokens_and_says_so(tiny: Path, tones: Path, tmp_path: Path) -> None:
    training, storage = settings_of("eva", lora_rank_pattern=None), Storage(str(tmp_path / "root"))
    with pytest.raises(SpecError, match=r"lora_r: of 1 clips have \d+ tokens, and lora_init eva wants 16") as caught:
        inits.begin(base_model(tiny), training, storage, 0, lambda: clips_of(tones, tiny, 1))
    assert caught.value.exit_code == 2


def test_eva_that_does_not_settle_stops(tiny: Path, tones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.init_data.EVA_PASSES", 2)
    training = settings_of("eva", lora_rank_pattern=None)
    model = base_model(tiny)
    with pytest.raises(JobFailedError, match=r"have not settled in 2 passes; raise engine\.init_clips"):
        eva_directions(model, lora_config(training, inits.plan_of(model, training)), clips_of(tones, tiny))


def test_a_state_of_another_run_is_refused(tiny: Path, tones: Path, tmp_path: Path) -> None:
    began(tiny, tones, tmp_path, settings_of("pissa"))
    with pytest.raises(InputError, match="is not how this run's adapter began"):
        began(tiny, tones, tmp_path, settings_of("pissa", use_dora=True))


def test_the_base_in_memory_is_changed_by_the_kept_factors_alone(tiny: Path, tones: Path, tmp_path: Path) -> None:
    first = began(tiny, tones, tmp_path, settings_of("pissa_niter_4"))
    torch.manual_seed(1)
    again = began(tiny, tones, tmp_path, settings_of("pissa_niter_4"))
    one, other = dict(first.named_parameters()), dict(again.named_parameters())
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_workers_begin_from_the_state_that_one_would_make(tiny: Path, tones: Path, tmp_path: Path) -> None:
    def spec(init: str, workers: int) -> JobSpec:
        root = tmp_path / f"{init}-{workers}"
        same = {"lora_dropout": 0.0, "per_dev_batch": 4 // workers, "sections": {"resources": {"workers": workers}}}
        return spec_of(tiny, tones, root, lora_init=init, lr=1e-3, **same)

    names = ("pissa", "eva")
    reports = train_in_processes([prepared(spec(name, 2)) for name in names], 2)
    for name, report in zip(names, reports, strict=True):
        assert "error" not in report, report.get("traceback")
        one, session = run_engine(spec(name, 1))
        alone, together = Path(spec(name, 1).root), Path(spec(name, 2).root)
        initial = [saved_adapter(root / inits.INITIAL) for root in (alone, together)]
        assert initial[0].keys() == initial[1].keys()
        assert all(torch.equal(initial[0][key], initial[1][key]) for key in initial[0])
        events = (report["events"], session.events)
        losses = [[each["loss"] for each in seen if each["event"] == "step"] for seen in events]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        ended = [saved_adapter(root / "adapter") for root in (alone, together)]
        # A sum over workers rounds otherwise than one over a batch.
        assert max(difference(ended[0][key], ended[1][key]) for key in ended[0]) <= 1e-5
        assert one["adapter"] == report["result"]["adapter"]
