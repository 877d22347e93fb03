"""DoRA by the fast path is PEFT's DoRA: outputs, gradients, what is learned, and what is merged."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import layers
import pytest
import torch
from engine import Run, batch_of, fill_adapters, job, logits_of, saved_adapter, watched
from layers import all_of, assert_alike_on_a_gpu, assert_close, gradients, relative, step_of
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperForConditionalGeneration

from jobs.adapter import ADAPTER_NAME, attach, lora_layers, trainable_parameters
from jobs.fast.dora import FastDora, row_norms, row_squares, speed_up
from jobs.inits import subtract_start
from jobs.train.checkpoint import Progress, adapter_state, read_checkpoint, write_checkpoint
from jobs.train.step import forward_loss
from service.spec.job import JobSpec
from service.spec.training import TrainingConfig

RANKS = {"decoder.layers.1.*": 3, "fc1": 6}
CPU = torch.device("cpu")


def dora(base: Path, filled: float = 0.2, **settings: Any) -> Any:
    """A Whisper with DoRA adapters whose parameters have moved away from where they begin."""
    torch.manual_seed(0)
    settings = {"use_dora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | settings
    model = attach(WhisperForConditionalGeneration.from_pretrained(base), TrainingConfig(**settings))[0]
    fill_adapters(model, filled)
    return model


def linears(*settings: Any, **options: Any) -> Any:
    """Two linear layers with DoRA adapters."""
    return layers.linears(*settings, use_dora=True, **options)


def direct_norms(model: Any) -> dict[str, Tensor]:
    """Norms of the rows of W + s B A, each from the whole matrix in float64."""
    found = {}
    for name, layer in lora_layers(model):
        a, b = (getattr(layer, factor)[ADAPTER_NAME].weight.double() for factor in ("lora_A", "lora_B"))
        weight = layer.get_base_layer().weight.double() + layer.scaling[ADAPTER_NAME] * b @ a
        found[name] = weight.norm(dim=1).detach()
    return found


def assert_norms_are_of_now(model: Any, fast: FastDora) -> None:
    norms = fast.norms()
    assert norms
    for name, expected in direct_norms(model).items():
        assert norms[name].dtype == torch.float32
        torch.testing.assert_close(norms[name].double(), expected, rtol=2e-6, atol=0)


class TestTheMathematics:
    """Against PEFT's own layers."""

    def test_a_layer_gives_outputs_and_gradients_of_peft(self) -> None:
        theirs, ours = linears(), linears()
        assert len(speed_up(ours)) == 2
        x = torch.randn(3, 7, 64)
        expected, found = all_of(theirs, x), all_of(ours, x)
        assert len(found) == 8
        assert_close(found, expected, 1e-5)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), expected["output"], rtol=1e-5, atol=1e-5)

    def test_its_gradients_are_those_of_its_output(self) -> None:
        model = linears(dtype=torch.float64).double()
        assert len(speed_up(model)) == 2
        names = [name for name, parameter in trainable_parameters(model) if "magnitude" in name]
        inputs = [torch.randn(2, 64, dtype=torch.float64, requires_grad=True)]
        magnitudes = [model.get_parameter(name) for name in names]

        def output(x: Tensor, *_: Tensor) -> Tensor:
            result: Tensor = model(x)
            return result

        # The norm is a constant to the gradients, but not to A and B themselves: those are compared with PEFT's.
        assert torch.autograd.gradcheck(output, (*inputs, *magnitudes))

    @pytest.mark.parametrize("freeze_encoder", [False, True])
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
    def test_a_whisper_gives_loss_and_gradients_of_peft(
        self, tiny: Path, tones: Path, freeze_encoder: bool, checkpointing: bool
    ) -> None:
        settings = {"freeze_encoder": freeze_encoder, "lora_rank_pattern": RANKS}
        theirs, ours = dora(tiny, **settings), dora(tiny, **settings)
        fast = speed_up(ours)
        assert len(fast) == (20 if freeze_encoder else 32)
        batch = batch_of(tiny, tones / "train.csv", 4)
        if checkpointing:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found = [step_of(model, batch, freeze_encoder=freeze_encoder) for model in (theirs, ours)]
        assert_close(found[1], found[0], 1e-5)

    @pytest.mark.parametrize("which", ["nano", "tiny"])
    def test_logits_are_those_of_peft_whatever_the_dropout(
        self, which: str, request: pytest.FixtureRequest, tones: Path
    ) -> None:
        base = request.getfixturevalue(which)
        model = dora(base, filled=0.05, lora_dropout=0.4, lora_rank_pattern=RANKS)
        batch = batch_of(base, tones / "train.csv", 2)
        with model.disable_adapter():
            without = logits_of(model, batch)
        theirs = logits_of(model, batch)
        for dropout in ("branch", "peft"):
            assert len(speed_up(model, dropout)) == 32
            with watched(DoraLinearLayer) as calls:
                ours = logits_of(model, batch)
            assert not calls
            assert relative(ours, theirs) < 1e-5
        assert relative(theirs, without) > 0.05, "the adapter does something"

    def test_a_short_training_learns_what_it_learns_with_peft(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        settings = {"use_dora": True, "lora_dropout": 0.0, "lora_rank_pattern": RANKS}
        runs = []
        for fast in (True, False):
            with watched(DoraLinearLayer) as calls:
                runs.append(Run(job(tiny, tones, tmp_path / str(fast), {"engine": {"fast_dora": fast}}, **settings)))
            assert bool(calls) is not fast, "in training, in its evaluations, and in that of what is published"
        ours, theirs = runs
        assert len(ours.steps()) == 7
        begun = {
            name: tensor for name, tensor in saved_start(theirs).items() if "magnitude" in name or "lora_B" in name
        }
        final = [run.adapter(7) for run in runs]
        apart = {
            name: float((final[0][name] - final[1][name]).norm() / (final[1][name] - start).norm())
            for name, start in begun.items()
        }
        print(f"apart by {max(apart.values()):.1e} of the way that was trained")
        assert max(apart.values()) < 1e-4
        assert ours.steps("loss") == pytest.approx(theirs.steps("loss"), rel=1e-5)


def saved_start(run: Run) -> dict[str, Tensor]:
    """The adapter as the run began."""
    return saved_adapter(run.root / "checkpoints/initial")


def masked(x: Tensor, rate: float, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return F.dropout(x, rate)


class TestDropout:
    """`lora_dropout` in training."""

    @pytest.mark.parametrize("fast", [True, False], ids=["fast", "PEFT's layers"])
    def test_branch_drops_the_input_of_the_low_rank_branch_alone(self, fast: bool) -> None:
        model = linears(lora_dropout=0.3).train()
        assert len(speed_up(model, "branch", fast=fast)) == 2 * fast
        for (_, layer), norm in zip(lora_layers(model), direct_norms(model).values(), strict=True):
            x = torch.randn(5, 3, layer.in_features)
            a, b = (getattr(layer, factor)[ADAPTER_NAME].weight for factor in ("lora_A", "lora_B"))
            magnitude = layer.lora_magnitude_vector[ADAPTER_NAME].weight
            base, scale = layer.get_base_layer(), layer.scaling[ADAPTER_NAME]

            def formula(_: Any, x: Tensor) -> Tensor:
                g = magnitude / norm.float()  # noqa: B023
                low = scale * masked(x, 0.3) @ a.T @ b.T  # noqa: B023
                product = g * (x @ base.weight.T + low)  # noqa: B023
                return product if base.bias is None else product + base.bias  # noqa: B023

            def own(layer: Any, x: Tensor) -> Tensor:
                torch.manual_seed(5)
                output: Tensor = layer(x)
                return output

            assert_close(all_of(layer, x, own), all_of(layer, x, formula), 1e-5)

    def test_peft_drops_what_peft_drops(self) -> None:
        theirs, ours = linears(lora_dropout=0.3).train(), linears(lora_dropout=0.3).train()
        assert len(speed_up(ours, "peft")) == 2
        x, outputs = torch.randn(4, 64), []
        for model in (theirs, ours):
            torch.manual_seed(1)
            outputs.append(model(x))
        assert torch.equal(*outputs)
        speed_up(ours, "branch")
        torch.manual_seed(1)
        assert relative(ours(x), outputs[0]) > 1e-3, "the two are not the same"

    def test_a_run_trains_as_the_setting_says(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        adapters = {}
        for dropout, fast in (("branch", True), ("branch", False), ("peft", True)):
            sections = {"engine": {"dora_dropout": dropout, "fast_dora": fast}}
            spec = job(tiny, tones, tmp_path / f"{dropout}-{fast}", sections, use_dora=True, lora_dropout=0.5)
            run = Run(spec)
            adapters[dropout, fast] = torch.cat([tensor.flatten() for tensor in run.adapter(7).values()])
        assert relative(adapters["branch", True], adapters["branch", False]) < 3e-5
        assert relative(adapters["branch", True], adapters["peft", True]) > 3e-4

    def test_only_what_is_dropped_is_part_of_what_a_result_depends_on(self) -> None:
        def sha(**engine: Any) -> str:
            return JobSpec.model_validate({"engine": engine}).sha256

        assert sha(fast_dora=False) == sha()
        assert sha(dora_dropout="peft") != sha(dora_dropout="branch") == sha()


class TestNorms:
    """Once per optimizer step, and always those of the parameters as they are."""

    def test_they_are_computed_once_between_two_steps(self, tiny: Path, tones: Path) -> None:
        model = dora(tiny)
        fast, batch = speed_up(model), batch_of(tiny, tones / "train.csv", 2)
        optimizer = torch.optim.AdamW([parameter for _, parameter in trainable_parameters(model)], lr=1e-2)
        logits_of(model, batch)  # first computed where nothing can be trained
        before = fast.norms()
        for _ in range(3):
            forward_loss(model.train(), batch, CPU, freeze_encoder=False).backward()
            logits_of(model, batch)
        assert all(fast.norms()[name] is norm for name, norm in before.items())
        optimizer.step()
        after = fast.norms()
        assert all(relative(after[name], norm) > 1e-4 for name, norm in before.items())
        assert_norms_are_of_now(model, fast)

    @pytest.mark.parametrize("foreach", [False, True])
    def test_an_optimizers_step_is_noticed(self, foreach: bool) -> None:
        model = linears()
        fast = speed_up(model)
        optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=0.1, foreach=foreach)
        for _ in range(3):
            gradients(model, model(torch.randn(4, 64)).square().sum())
            optimizer.step()
            assert_norms_are_of_now(model, fast)

    def test_one_that_leaves_no_trace_is_said_by_refresh(self) -> None:
        model = linears()
        fast = speed_up(model)
        optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)], lr=0.1, fused=True)
        for _ in range(2):
            gradients(model, model(torch.randn(4, 64)).square().sum())
            optimizer.step()
            fast.refresh()
            assert_norms_are_of_now(model, fast)

    def test_a_checkpoint_and_an_adapter_that_are_loaded_are_noticed(self, tiny: Path, tmp_path: Path) -> None:
        model = dora(tiny)
        fast = speed_up(model)
        write_checkpoint(tmp_path, model, None, Progress(), {}, [])
        kept, norms = adapter_state(model), fast.norms()
        fill_adapters(model, 0.1, seed=1)
        assert all(relative(fast.norms()[name], norm) > 1e-3 for name, norm in norms.items())
        read_checkpoint(tmp_path, model, {})
        assert all(torch.equal(fast.norms()[name], norm) for name, norm in norms.items())
        fill_adapters(model, 0.1, seed=1)
        fast.norms()
        set_peft_model_state_dict(model, kept)
        assert all(torch.equal(fast.norms()[name], norm) for name, norm in norms.items())

    def test_another_base_and_another_scale_are_noticed(self) -> None:
        model = linears()
        fast = speed_up(model)
        assert_norms_are_of_now(model, fast)
        for _, layer in lora_layers(model):
            subtract_start(layer)
        assert_norms_are_of_now(model, fast)
        for _, layer in lora_layers(model):
            weight = layer.get_base_layer().weight
            for _ in range(4):  # memory that was given back is taken again
                weight.data = weight.data * 1.1
                gc.collect()
        assert_norms_are_of_now(model, fast)
        for _, layer in lora_layers(model):
            layer.scale_layer(3.0)
        assert_norms_are_of_now(model, fast)

    def test_at_initialisation_in_forward_and_at_merge_they_are_one(self, tiny: Path) -> None:
        for init in (True, "orthogonal"):
            model = dora(tiny, filled=0.0, lora_init=init)
            norms = speed_up(model).norms()
            for name, layer in lora_layers(model):
                torch.testing.assert_close(
                    layer.lora_magnitude_vector[ADAPTER_NAME].weight.detach(), norms[name], rtol=1e-6, atol=0
                )
        fill_adapters(model, 0.1)
        norms = speed_up(model).norms()
        for name, layer in lora_layers(model):
            layer.merge(safe_merge=True)
            torch.testing.assert_close(layer._caches[f"{ADAPTER_NAME}-weight_norm"], norms[name], rtol=2e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_many_adapters_over_one_base_have_the_norms_of_each(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        weight = torch.randn(48, 64).to(dtype)
        a, b, scale = torch.randn(2, 3, 5, 64), torch.randn(2, 3, 48, 5), torch.rand(2, 3) + 0.5
        with torch.autocast("cpu", torch.bfloat16):
            squares = row_squares(weight)
            found = row_norms(weight, squares, a, b, scale)
            one = row_norms(weight, squares, a[1, 2], b[1, 2], float(scale[1, 2]))
            alike = row_norms(weight, squares, a, b, 0.5)
        assert found.shape == (2, 3, 48)
        assert found.dtype == one.dtype == torch.float32

        def direct(scale: Tensor) -> Tensor:
            return (weight.double() + scale * (b.double() @ a.double())).norm(dim=-1)

        torch.testing.assert_close(found.double(), direct(scale.double()[..., None, None]), rtol=1e-6, atol=0)
        torch.testing.assert_close(alike.double(), direct(torch.tensor(0.5)), rtol=1e-6, atol=0)
        torch.testing.assert_close(one, found[1, 2], rtol=1e-6, atol=0)

    def test_a_row_that_the_update_takes_away_has_a_norm(self) -> None:
        torch.manual_seed(0)
        a, b = torch.randn(4, 64), torch.randn(500, 4)
        weight = -(b @ a)
        norms = row_norms(weight, row_squares(weight), a, b, 1.0)
        assert bool((norms > 0).all())
        assert bool((norms < 1e-3 * weight.norm(dim=1)).all())


class TestPrecision:
    """Low precision, against float64."""

    @pytest.mark.parametrize("adapter", [None, torch.bfloat16], ids=["float32 adapters", "bfloat16 adapters"])
    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16 base"])
    def test_dtypes_are_those_of_peft(self, base: torch.dtype, adapter: torch.dtype | None) -> None:
        found = []
        for fast in (True, False):
            model = linears(dtype=base, adapter_dtype=adapter)
            speed_up(model, fast=fast)
            with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
                found.append(all_of(model, torch.randn(3, 64).to(base)))
        ours, theirs = ({name: tensor.dtype for name, tensor in each.items()} for each in found)
        assert ours == theirs
        assert ours["output"] == torch.bfloat16

    @pytest.mark.parametrize(
        ("base", "adapter", "bound"),
        [(torch.float32, None, 1.05), (torch.bfloat16, None, 1.05), (torch.bfloat16, torch.bfloat16, 0.7)],
        ids=["autocast", "bfloat16 base", "bfloat16 base and adapters"],
    )
    def test_errors_are_no_larger_than_pefts(
        self, base: torch.dtype, adapter: torch.dtype | None, bound: float, record_property: Any
    ) -> None:
        """Root mean squares of relative errors over ten inputs."""
        errors: dict[bool, list[float]] = {True: [], False: []}
        models = {fast: linears(dtype=base, adapter_dtype=adapter) for fast in errors}
        truth = copy.deepcopy(models[True]).double()
        for fast, model in models.items():
            speed_up(model, fast=fast)
        for seed in range(10):
            torch.manual_seed(seed)
            x = torch.randn(64, 64).to(base)
            expected = all_of(truth, x.double())
            for fast, model in models.items():
                with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
                    found = all_of(model, x)
                errors[fast].append(sum(relative(found[name], expected[name]) ** 2 for name in found))
        ours, theirs = ((sum(errors[fast]) / 80) ** 0.5 for fast in (True, False))
        record_property("ours", ours)
        record_property("PEFT's", theirs)
        print(f"relative errors: ours {ours:.2e}, PEFT's {theirs:.2e}")
        assert ours < bound * theirs

    def test_a_scaled_loss_in_float16_overflows_on_the_way_to_no_gradient(self) -> None:
        """That of the magnitude sums products of the output's gradient with W x; float16 ends at 65,504."""
        model, x, found = linears(filled=0.01), 100 * torch.randn(4, 64), []
        with torch.no_grad():
            for _, layer in lora_layers(model):
                layer.lora_A[ADAPTER_NAME].weight.mul_(0.01)  # else its own gradients overflow
        assert len(speed_up(model)) == 2
        for half in (False, True):
            with torch.autocast("cpu", torch.float16, enabled=half):
                output = model(x)
            found.append(gradients(model, 4096 * output.float().sum()))
        assert 4096 * float(output.detach().abs().max()) > 65_504
        assert_close(found[1], found[0], 0.01)

    def test_norms_under_autocast_are_those_of_float32(self, tiny: Path, tones: Path) -> None:
        model = dora(tiny)
        expected, theirs = direct_norms(model), {}
        with torch.autocast("cpu", torch.bfloat16):
            for name, layer in lora_layers(model):
                magnitude = layer.lora_magnitude_vector[ADAPTER_NAME]
                update = magnitude.get_lora_weight(layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME])
                weight = layer.get_base_layer().weight
                norm = magnitude.get_weight_norm(weight, update.float(), layer.scaling[ADAPTER_NAME])
                theirs[name] = relative(norm, expected[name])
            fast = speed_up(model)
            ours = {name: relative(norm, expected[name]) for name, norm in fast.norms().items()}
        print(f"relative errors of norms: ours {max(ours.values()):.1e}, PEFT's {max(theirs.values()):.1e}")
        assert max(ours.values()) < 1e-6
        assert min(theirs.values()) > 1e-5

    def test_logits_under_autocast_are_as_near_to_the_truth_as_pefts(self, nano: Path, tones: Path) -> None:
        model = dora(nano, filled=0.05)
        batch = batch_of(nano, tones / "train.csv", 4)
        truth = logits_of(copy.deepcopy(model).double(), batch)
        errors = {}
        for fast in (False, True):
            speed_up(model, fast=fast)
            with torch.autocast("cpu", torch.bfloat16):
                errors[fast] = relative(logits_of(model, batch), truth)
        print(f"relative errors of logits: ours {errors[True]:.2e}, PEFT's {errors[False]:.2e}")
        assert errors[True] < 1.05 * errors[False]

    @pytest.mark.gpu
    def test_on_a_gpu_it_is_peft_too(self, tiny: Path, tones: Path) -> None:
        def made(fast: bool) -> Any:
            model = dora(tiny).to("cuda")
            assert len(speed_up(model, fast=fast)) == 32 * fast
            return model

        assert_alike_on_a_gpu(made, batch_of(tiny, tones / "train.csv", 4))


class TestTheRestIsPefts:
    """What is not the fast path's own."""

    def test_names_parameters_merging_and_disabling(self, tiny: Path, tones: Path) -> None:
        plain, model = dora(tiny), dora(tiny)
        speed_up(model)
        batch = batch_of(tiny, tones / "train.csv", 4)
        assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
        assert list(model.state_dict()) == list(plain.state_dict())
        one, other = get_peft_model_state_dict(model), get_peft_model_state_dict(plain)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        adapted = logits_of(model, batch)
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(logits_of(model, batch), logits_of(plain, batch))
        model.merge_adapter()
        assert relative(logits_of(model, batch), adapted) < 1e-5
        model.unmerge_adapter()
        assert relative(logits_of(model, batch), adapted) < 1e-5
        ours = dora(tiny)
        speed_up(ours)
        merged, expected = (each.merge_and_unload(safe_merge=True) for each in (ours, plain))
        assert merged.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(merged.state_dict()[name], weight) for name, weight in expected.state_dict().items())
        assert relative(logits_of(merged, batch), adapted) < 1e-5

    def test_a_second_adapter_and_one_for_the_base_are_computed_by_peft(self) -> None:
        models = linears(), linears()
        speed_up(models[1])
        for model in models:
            torch.manual_seed(3)
            model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
            model.set_adapter("other")
        x = torch.randn(3, 64)
        assert torch.equal(models[0](x), models[1](x))

    def test_a_base_that_is_trained_gets_its_gradient(self) -> None:
        models = linears(), linears()
        speed_up(models[1])
        x, found = torch.randn(3, 64), []
        for model in models:
            for _, layer in lora_layers(model):
                layer.get_base_layer().requires_grad_(True)
            found.append(all_of(model, x))
        assert torch.equal(*(each["base_model.model.0.base_layer.weight"] for each in found))

    def test_lora_and_offloaded_layers_stay_as_they_are(self, tiny: Path) -> None:
        lora = dora(tiny, use_dora=False)
        assert len(speed_up(lora)) == 0
        assert not any("forward" in vars(layer) for _, layer in lora_layers(lora))
        offloaded = linears()
        for _, layer in lora_layers(offloaded):
            layer.ephemeral_gpu_offload = True
        assert len(speed_up(offloaded)) == 0
        base = WhisperForConditionalGeneration.from_pretrained(tiny)
        assert len(speed_up(base)) == 0

    def test_it_can_be_switched_off_again_and_copied(self) -> None:
        model, x = linears(), torch.randn(3, 64)
        expected = model(x)
        speed_up(model)
        other = copy.deepcopy(model)
        fill_adapters(other, 0.2, seed=4)
        assert relative(model(x), expected) < 1e-5
        assert relative(other(x), expected) > 1e-2, "a copy computes with its own parameters"
        speed_up(model, "peft", fast=False)
        assert torch.equal(model(x), expected)

    def test_modules_that_are_trained_in_full_get_pefts_gradients(self, tiny: Path, tones: Path) -> None:
        settings = {"modules_to_save": ["embed_tokens"]}
        batch, found = batch_of(tiny, tones / "train.csv", 4), []
        for fast in (False, True):
            model = dora(tiny, **settings)
            speed_up(model, fast=fast)
            found.append(gradients(model, forward_loss(model.train(), batch, CPU, freeze_encoder=False)))
        assert any("embed_tokens" in name for name in found[0])
        assert_close(found[1], found[0], 1e-5)
