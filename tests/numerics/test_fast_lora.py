"""LoRA by the fast path is PEFT's LoRA: outputs, gradients, what is learned, and what is merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Run, batch_of, fill_adapters, job, logits_of, watched
from layers import all_of, assert_alike_on_a_gpu, assert_close, gradients, linears, relative, step_of
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from jobs.adapter import ADAPTER_NAME, attach, lora_layers, trainable_parameters
from jobs.fast.lora import speed_up
from service.spec.job import JobSpec
from service.spec.training import TrainingConfig

pytestmark = pytest.mark.setting("engine.fast_lora")

RANKS = {"decoder.layers.1.*": 3, "fc1": 6}
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rank-stabilised": {"use_rslora": True},
    "ranks and alphas": {"rank_pattern": {"0": 3}, "alpha_pattern": {"1": 5}},
}


def lora(base: Path, filled: float = 0.2, **settings: Any) -> Any:
    """A Whisper with LoRA adapters whose parameters have moved away from where they begin."""
    torch.manual_seed(0)
    settings = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | settings
    model = attach(WhisperForConditionalGeneration.from_pretrained(base), TrainingConfig(**settings))[0]
    fill_adapters(model, filled)
    return model


def seeded(model: Any, x: Tensor) -> Tensor:
    """A forward pass that drops what each other one drops."""
    torch.manual_seed(5)
    output: Tensor = model(x)
    return output


def pair(**options: Any) -> tuple[Any, Any]:
    """The same layers twice: PEFT's, and ours."""
    theirs, ours = linears(**options).train(), linears(**options).train()
    assert speed_up(ours) == 2
    return theirs, ours


class TestTheMathematics:
    """Against PEFT's own layers."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_layer_gives_outputs_and_gradients_of_peft(self, kind: str) -> None:
        theirs, ours = pair(**KINDS[kind])
        x = torch.randn(3, 7, 64)
        expected = all_of(theirs, x, seeded)
        with watched(Linear) as calls:
            found = all_of(ours, x, seeded)
            with torch.no_grad():
                unseen = seeded(ours, x)
        assert not calls
        assert len(found) == 6
        assert_close(found, expected, 1e-6)
        assert torch.equal(unseen, found["output"]), "without gradients it is the same"
        evaluated = [each.eval()(x) for each in (theirs, ours)]
        assert relative(evaluated[1], evaluated[0]) < 1e-6

    def test_its_gradients_are_those_of_its_output(self) -> None:
        model = linears(dtype=torch.float64).double()
        assert speed_up(model) == 2
        x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
        factors = [parameter for _, parameter in trainable_parameters(model)]
        assert len(factors) == 4

        def output(x: Tensor, *_: Tensor) -> Tensor:
            result: Tensor = model(x)
            return result

        assert torch.autograd.gradcheck(output, (x, *factors))

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x[0, 0],
            lambda x: x[:, 0].expand(5, 3, 64),
            lambda x: x.transpose(0, 1),
            lambda x: x[:0],
            lambda x: x[:, None],
        ],
        ids=["one vector", "expanded", "transposed", "empty", "four dimensions"],
    )
    def test_inputs_of_any_shape(self, view: Callable[[Tensor], Tensor]) -> None:
        theirs, ours = pair()
        x, found = torch.randn(3, 7, 64), []
        for model in (theirs, ours):
            found.append(all_of(model, x, lambda model, x: model(view(x)).transpose(0, -1)[..., ::2, None]))
        assert found[0]["output"].shape == found[1]["output"].shape
        for name, expected in found[0].items():
            torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-5)

    def test_only_gradients_that_are_wanted_are_computed(self) -> None:
        theirs, ours = pair()
        x, found = torch.randn(3, 64), []
        for model in (theirs, ours):
            for _, layer in lora_layers(model):
                layer.lora_A[ADAPTER_NAME].requires_grad_(False)
            found.append(gradients(model, model(x).square().sum()))
        assert len(found[1]) == 2
        assert_close(found[1], found[0], 1e-6)

    @pytest.mark.parametrize("freeze_encoder", [False, True])
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_a_whisper_gives_loss_and_gradients_of_peft(
        self, tiny: Path, tones: Path, freeze_encoder: bool, checkpointing: bool, dropout: float
    ) -> None:
        settings = {"freeze_encoder": freeze_encoder, "lora_rank_pattern": RANKS, "lora_dropout": dropout}
        theirs, ours = lora(tiny, **settings), lora(tiny, **settings)
        assert speed_up(ours) == (20 if freeze_encoder else 32)
        batch = batch_of(tiny, tones / "train.csv", 4)
        if checkpointing:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = [step_of(model, batch, freeze_encoder=freeze_encoder) for model in (theirs, ours)]
        assert_close(found[1], found[0], 1e-5)

    def test_a_short_training_learns_what_it_learns_with_peft(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        settings = {"lora_dropout": 0.1, "lora_rank_pattern": RANKS}
        runs = []
        for fast in (True, False):
            with watched(Linear) as calls:
                runs.append(Run(job(tiny, tones, tmp_path / str(fast), {"engine": {"fast_lora": fast}}, **settings)))
            assert bool(calls) is not fast, "in training, in its evaluations, and in that of what is published"
        ours, theirs = runs
        assert len(ours.steps()) == 7
        # B begins at 0, so that all of it was learned.
        mine, peft = ({name: b for name, b in run.adapter(7).items() if "lora_B" in name} for run in runs)
        assert_close(mine, peft, 1e-4)
        assert ours.steps("loss") == pytest.approx(theirs.steps("loss"), rel=1e-5)

    def test_it_is_nothing_that_a_result_depends_on(self) -> None:
        assert JobSpec.model_validate({"engine": {"fast_lora": False}}).sha256 == JobSpec().sha256


class TestPrecision:
    """Low precision, against float64."""

    @pytest.mark.parametrize("adapter", [None, torch.bfloat16], ids=["float32 adapters", "bfloat16 adapters"])
    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16 base"])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_dtypes_are_those_of_peft(self, base: torch.dtype, adapter: torch.dtype | None, dropout: float) -> None:
        found = []
        for model in pair(dtype=base, adapter_dtype=adapter, lora_dropout=dropout):
            with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
                found.append(all_of(model, torch.randn(3, 64).to(base)))
        theirs, ours = ({name: tensor.dtype for name, tensor in each.items()} for each in found)
        assert ours == theirs
        assert ours["output"] == torch.bfloat16

    @pytest.mark.parametrize(
        ("base", "adapter"),
        [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)],
        ids=["autocast", "bfloat16 base", "bfloat16 base and adapters"],
    )
    def test_errors_are_no_larger_than_pefts(
        self, base: torch.dtype, adapter: torch.dtype | None, record_property: Any
    ) -> None:
        """Root mean squares of relative errors over ten inputs."""
        models = dict(zip((False, True), pair(dtype=base, adapter_dtype=adapter), strict=True))
        truth = copy.deepcopy(models[False]).double()
        errors: dict[bool, list[float]] = {True: [], False: []}
        for seed in range(10):
            torch.manual_seed(seed)
            x = torch.randn(64, 64).to(base)
            expected = all_of(truth, x.double())
            for fast, model in models.items():
                with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
                    found = all_of(model, x)
                errors[fast].append(sum(relative(found[name], expected[name]) ** 2 for name in found))
        ours, theirs = ((sum(errors[fast]) / 60) ** 0.5 for fast in (True, False))
        record_property("ours", ours)
        record_property("PEFT's", theirs)
        print(f"relative errors: ours {ours:.2e}, PEFT's {theirs:.2e}")
        assert ours < 1.05 * theirs

    @pytest.mark.gpu
    def test_on_a_gpu_it_is_peft_too(self, tiny: Path, tones: Path) -> None:
        def made(fast: bool) -> Any:
            model = lora(tiny).to("cuda")
            assert speed_up(model, fast=fast) == 32 * fast
            return model

        assert_alike_on_a_gpu(made, batch_of(tiny, tones / "train.csv", 4))


class TestTheRestIsPefts:
    """What is not the fast path's own."""

    def test_names_parameters_merging_and_disabling(self, tiny: Path, tones: Path) -> None:
        plain, model = lora(tiny), lora(tiny)
        speed_up(model)
        batch = batch_of(tiny, tones / "train.csv", 4)
        assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
        assert list(model.state_dict()) == list(plain.state_dict())
        adapted = logits_of(model, batch)
        with model.disable_adapter(), plain.disable_adapter():
            without = logits_of(model, batch)
            assert torch.equal(without, logits_of(plain, batch))
        assert relative(adapted, without) > 0.05, "the adapter does something"
        model.merge_adapter()
        assert relative(logits_of(model, batch), adapted) < 1e-5
        model.unmerge_adapter()
        assert relative(logits_of(model, batch), adapted) < 1e-5
        ours = lora(tiny)
        speed_up(ours)
        merged, expected = (each.merge_and_unload(safe_merge=True) for each in (ours, plain))
        assert all(torch.equal(merged.state_dict()[name], weight) for name, weight in expected.state_dict().items())

    def test_a_scale_that_changes_is_noticed(self) -> None:
        theirs, ours = pair()
        x = torch.randn(3, 64)
        ours(x)
        for model in (theirs, ours):
            for _, layer in lora_layers(model):
                layer.scale_layer(3.0)
        assert relative(ours(x), theirs(x)) < 1e-6

    def test_a_second_adapter_is_computed_by_peft(self) -> None:
        models = pair()
        for model in models:
            torch.manual_seed(3)
            model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
            model.set_adapter("other")
        x = torch.randn(3, 64)
        assert torch.equal(models[0](x), models[1](x))

    def test_a_base_that_is_trained_gets_its_gradient(self) -> None:
        x, found = torch.randn(3, 64), []
        for model in pair():
            for _, layer in lora_layers(model):
                layer.get_base_layer().requires_grad_(True)
            found.append(all_of(model, x))
        assert torch.equal(*(each["base_model.model.0.base_layer.weight"] for each in found))

    def test_dora_and_trained_biases_of_adapters_stay_as_they_are(self, tiny: Path) -> None:
        for model in (linears(use_dora=True), linears(lora_bias=True, target_modules=["0"])):
            assert speed_up(model) == 0
            assert not any("forward" in vars(layer) for _, layer in lora_layers(model))
        assert speed_up(WhisperForConditionalGeneration.from_pretrained(tiny)) == 0

    def test_it_can_be_switched_off_again_and_copied(self) -> None:
        theirs, ours = pair()
        x = torch.randn(3, 64)
        twin = copy.deepcopy(ours)
        fill_adapters(ours, 0.1, seed=2)
        with watched(Linear) as calls:
            assert relative(twin(x), theirs(x)) < 1e-6
            before = len(calls)
            assert speed_up(ours, fast=False) == 0
            ours(x)
            assert len(calls) == before + 2
