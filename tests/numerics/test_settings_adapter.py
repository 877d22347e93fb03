"""What the settings of the adapter do, by the closed formulas of LoRA and DoRA on what a run leaves behind."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Run, batch_of, events, fill_adapters, job, logits_of
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from jobs.adapter import attach, load_adapter, lora_config, lora_layers, plan_adapter, trainable_parameters
from service.errors import SpecError
from service.spec.flags import Override
from service.spec.load import LoadedSpec, load_spec
from service.spec.training import TrainingConfig
from service.spec.whisper_dims import WhisperDims

EMBEDDING = "model.decoder.embed_tokens"
PREFIX = "base_model.model."
LINEAR = re.compile(r"model\.(encoder|decoder)\.layers\.\d\.((self|encoder)_attn\.(q|k|v|out)_proj|fc[12])")


def base_model(checkpoint: Path) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()


def adapted(tiny: Path, **settings: Any) -> Any:
    """A base with fresh adapters."""
    torch.manual_seed(0)
    return attach(base_model(tiny), TrainingConfig(**settings))[0]


def layers(model: Any) -> dict[str, Any]:
    """Adapted layers by the names that they have in the base."""
    return {name.removeprefix(PREFIX): layer for name, layer in lora_layers(model)}


def load(folder: Path, tiny: Path, tones: Path, **training: Any) -> LoadedSpec:
    """A spec from a file, as a user's is read."""
    data = {"train_csv": str(tones / "train.csv"), "val_csv": str(tones / "val.csv"), "base_model": str(tiny)}
    (folder / "spec.json").write_text(json.dumps(data | training))
    return load_spec(folder / "spec.json")


def refusal(folder: Path, tiny: Path, tones: Path, **training: Any) -> str:
    with pytest.raises(SpecError) as caught:
        load(folder, tiny, tones, **training)
    return str(caught.value)


def update(adapter: dict[str, Tensor], name: str) -> Tensor:
    """B @ A of a module, by the adapter's file."""
    return adapter[f"{PREFIX}{name}.lora_B.weight"] @ adapter[f"{PREFIX}{name}.lora_A.weight"]


RANK, ALPHA = 4, 24
RANKS = {"decoder.layers.1.*": 3, "fc1": 6, "decoder.layers.1.fc2": 5}
ALPHAS = {"decoder.layers.0.encoder_attn.k_proj": 7, "(q|k)_proj": 9, "encoder.layers.*": 40}


def rank_of(name: str) -> int:
    """By the order of RANKS: its third key never takes effect."""
    return 3 if name.startswith("model.decoder.layers.1.") else 6 if name.endswith(".fc1") else RANK


def alpha_of(name: str) -> int:
    """By the order of ALPHAS."""
    if name == "model.decoder.layers.0.encoder_attn.k_proj":
        return 7
    if name.endswith((".q_proj", ".k_proj")):
        return 9
    return 40 if name.startswith("model.encoder.") else ALPHA


class Merged:
    """A run with ranks and alphas of its own, merged: base, adapter's file and merged checkpoint."""

    def __init__(self, tiny: Path, tones: Path, root: Path, use_dora: bool) -> None:
        settings = {"lora_r": RANK, "lora_alpha": ALPHA, "use_dora": use_dora, "lr": 0.02}
        patterns = {"lora_rank_pattern": RANKS, "lora_alpha_pattern": ALPHAS}
        self.run = Run(job(tiny, tones, root, save_steps=1, **settings, **patterns))
        self.run.merge()
        self.base = base_model(tiny).state_dict()
        self.merged = base_model(root / "merged").state_dict()
        self.adapter = self.run.adapter()
        self.names = [name.removesuffix(".weight") for name in self.base if LINEAR.fullmatch(name[:-7])]


@pytest.fixture(scope="module", params=[False, True], ids=["LoRA", "DoRA"])
def done(request: pytest.FixtureRequest, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return Merged(tiny, tones, tmp_path_factory.mktemp("merged") / "run", request.param)


@pytest.mark.setting("lora_r", "lora_rank_pattern", "use_dora")
def test_factors_and_magnitudes_have_the_shapes_of_their_ranks(done: Merged) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for name in done.names:
        rows, columns = done.base[f"{name}.weight"].shape
        expected[f"{PREFIX}{name}.lora_A.weight"] = (rank_of(name), columns)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (rows, rank_of(name))
        if done.run.spec.training.use_dora:
            expected[f"{PREFIX}{name}.lora_magnitude_vector"] = (rows,)
    assert len(done.names) == 32
    assert {name: tuple(tensor.shape) for name, tensor in done.adapter.items()} == expected
    assert {rank_of(name) for name in done.names} == {3, 4, 6}


@pytest.mark.setting("lora_r", "lora_alpha", "lora_rank_pattern", "lora_alpha_pattern", "use_dora", "merge_lora")
def test_merged_weights_are_those_of_the_formula(done: Merged) -> None:
    moved = 0.0
    for name in done.names:
        base, merged = done.base[f"{name}.weight"], done.merged[f"{name}.weight"]
        change = alpha_of(name) / rank_of(name) * update(done.adapter, name)
        expected = base + change
        if done.run.spec.training.use_dora:
            direction = expected / expected.norm(dim=1, keepdim=True)
            expected = done.adapter[f"{PREFIX}{name}.lora_magnitude_vector"][:, None] * direction
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
        moved = max(moved, float(change.abs().max()))
    assert moved > 0.05
    assert len({alpha_of(name) / rank_of(name) for name in done.names}) == 8
    others = [name for name in done.base if name.removesuffix(".weight") not in done.names]
    assert all(torch.equal(done.base[name], done.merged[name]) for name in others)


@pytest.mark.setting("use_dora")
def test_magnitudes_begin_as_the_norms_of_the_base_and_are_trained(tiny: Path, tones: Path, tmp_path: Path) -> None:
    norms = {f"{PREFIX}{name}.lora_magnitude_vector": weight.norm(dim=1) for name, weight in weights(tiny).items()}
    begun = {
        name: layer.lora_magnitude_vector["default"].weight
        for name, layer in layers(adapted(tiny, use_dora=True)).items()
    }
    for name, magnitude in begun.items():
        torch.testing.assert_close(magnitude.detach(), norms[f"{PREFIX}{name}.lora_magnitude_vector"])
    adapter = Run(job(tiny, tones, tmp_path / "run", use_dora=True)).adapter()
    assert all(not torch.allclose(adapter[name], norm, rtol=1e-4) for name, norm in norms.items())
    assert not any("magnitude" in name for name, _ in trainable_parameters(adapted(tiny)))


def weights(tiny: Path) -> dict[str, Tensor]:
    """The weights of all linear layers that can have an adapter."""
    state = base_model(tiny).state_dict()
    return {name[:-7]: tensor for name, tensor in state.items() if LINEAR.fullmatch(name.removesuffix(".weight"))}


@pytest.mark.setting("lora_alpha", "lora_r")
@pytest.mark.parametrize(("rank", "alpha"), [(2, 1), (2, 8), (8, 8), (8, 64)])
def test_the_update_counts_alpha_over_rank_times(tiny: Path, rank: int, alpha: int) -> None:
    model = adapted(tiny, lora_r=rank, lora_alpha=alpha, lora_dropout=0.5).eval()
    fill_adapters(model, 0.1)
    layer = layers(model)["model.decoder.layers.0.fc1"]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    a, b = (getattr(layer, factor)["default"].weight for factor in ("lora_A", "lora_B"))
    torch.testing.assert_close(layer(x) - layer.base_layer(x), alpha / rank * x @ a.T @ b.T, rtol=1e-4, atol=1e-5)


@pytest.mark.setting("lora_dropout")
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_that_share_of_an_adapters_inputs_is_left_out_in_training_alone(
    tiny: Path, rate: float, use_dora: bool
) -> None:
    model = adapted(tiny, lora_dropout=rate, use_dora=use_dora)
    for layer in layers(model).values():
        torch.manual_seed(0)
        kept = layer.train().lora_dropout["default"](torch.ones(100, 100))
        assert float((kept == 0).float().mean()) == pytest.approx(rate, abs=0.02)
        whole = layer.eval().lora_dropout["default"](torch.ones(100, 100))
        assert bool((whole == 1).all())


TARGETS: dict[str, tuple[Any, str]] = {
    # setting: its value, and what it should adapt, as a regular expression over all linear layers
    "by name": (["q_proj", "fc1"], r".*\.(q_proj|fc1)"),
    "by part of a name": (["encoder_attn.v_proj", "layers.1.fc2"], r".*(encoder_attn\.v_proj|layers\.1\.fc2)"),
    "by whole name": (["model.encoder.layers.0.self_attn.k_proj"], r"model\.encoder\.layers\.0\.self_attn\.k_proj"),
    "regular expression": (r"model\.decoder\.layers\.\d\.encoder_attn\.(q|v)_proj", r".*\.encoder_attn\.[qv]_proj"),
    "all-linear": ("all-linear", r".*"),
    "JSON text": ('["fc1", "fc2"]', r".*\.fc[12]"),
}


class TestTargets:
    """lora_target_modules."""

    @pytest.mark.setting("lora_target_modules")
    @pytest.mark.parametrize(("targets", "expected"), TARGETS.values(), ids=TARGETS)
    def test_adapters_are_where_it_says_and_nowhere_else(
        self, tiny: Path, tones: Path, tmp_path: Path, targets: Any, expected: str
    ) -> None:
        training = load(tmp_path, tiny, tones, lora_target_modules=targets).spec.training
        model, _ = attach(base_model(tiny), training)
        wanted = {name for name in weights(tiny) if re.fullmatch(expected, name)}
        assert wanted
        assert set(layers(model)) == wanted
        trained = {name.split(".lora_")[0].removeprefix(PREFIX) for name, _ in trainable_parameters(model)}
        assert trained == wanted

    @pytest.mark.setting("lora_target_modules")
    def test_by_default_it_is_every_linear_layer_of_attention_and_mlp(self, tiny: Path) -> None:
        assert set(layers(adapted(tiny))) == set(weights(tiny))

    @pytest.mark.setting("lora_target_modules")
    @pytest.mark.parametrize("targets", [["o_proj", "fc1"], r".*\.(o_proj|fc1)"])
    def test_o_proj_means_out_proj_and_is_said(self, tiny: Path, tones: Path, tmp_path: Path, targets: Any) -> None:
        loaded = load(tmp_path, tiny, tones, lora_target_modules=targets)
        (line,) = loaded.warnings
        assert "lora_target_modules: `o_proj` is taken to mean `out_proj`" in line
        model, _ = attach(base_model(tiny), loaded.spec.training)
        assert {name.rsplit(".", 1)[1] for name in layers(model)} == {"out_proj", "fc1"}
        assert len(layers(model)) == 6 + 4

    @pytest.mark.setting("lora_target_modules")
    def test_one_that_matches_nothing_is_an_error_that_names_the_nearest(
        self, tiny: Path, tones: Path, tmp_path: Path
    ) -> None:
        said = refusal(tmp_path, tiny, tones, lora_target_modules=["q_porj", "decoder.layers.7.fc1", "fc1"])
        assert '"q_porj" matches no module' in said
        assert "did you mean q_proj" in said
        assert "its decoder has 2 layers, 0 to 1" in said


class TestSavedModules:
    """modules_to_save."""

    @pytest.fixture(scope="class")
    def run(self, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
        """Embeddings trained in full beside adapters in the decoder, merged."""
        settings = {"modules_to_save": ["embed_tokens"], "freeze_encoder": True, "use_dora": True, "lr": 0.01}
        run = Run(job(tiny, tones, tmp_path_factory.mktemp("saved") / "run", **settings))
        run.merge()
        return run

    @pytest.mark.setting("modules_to_save")
    def test_embeddings_are_trained_and_stay_tied_in_every_form(self, run: Run, tiny: Path, tones: Path) -> None:
        base = base_model(tiny)
        before = base.get_input_embeddings().weight.detach().clone()
        full = {name: tensor for name, tensor in run.adapter().items() if "lora_" not in name}
        # PEFT keeps the head under a name of its own, with the same content.
        assert full.keys() == {f"{PREFIX}{EMBEDDING}.weight", f"{PREFIX}proj_out.weight"}
        learned, head = full.values()
        assert torch.equal(learned, head)
        moved = (learned - before).abs().amax(dim=1)
        assert int((moved > 1e-4).sum()) > 1000, "the head's gradient reaches the row of every token"

        loaded = load_adapter(base, run.root / "adapter")
        whisper = loaded.get_base_model()
        assert torch.equal(whisper.model.decoder.embed_tokens.modules_to_save["default"].weight, learned)
        assert whisper.proj_out.weight is whisper.get_input_embeddings().weight
        file = load_file(run.root / "merged/model.safetensors")
        assert torch.equal(file[f"{EMBEDDING}.weight"], learned)
        assert "proj_out.weight" not in file, "one matrix for both"
        merged = base_model(run.root / "merged")
        assert merged.proj_out.weight is merged.get_input_embeddings().weight
        batch = batch_of(tiny, tones / "val.csv", 5)
        expected = logits_of(loaded, batch)
        assert float((logits_of(merged, batch) - expected).abs().max()) <= 1e-4
        assert float((logits_of(base_model(tiny), batch) - expected).abs().max()) > 0.1

    @pytest.mark.setting("modules_to_save", "freeze_encoder")
    def test_the_frozen_encoder_beside_them_stays_the_bases(self, run: Run, tiny: Path) -> None:
        before, after = base_model(tiny).state_dict(), base_model(run.root / "merged").state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name for name in changed if ".layers." not in name} == {f"{EMBEDDING}.weight", "proj_out.weight"}
        assert not any("encoder." in name and "decoder." not in name for name in changed)

    @pytest.mark.setting("modules_to_save")
    @pytest.mark.parametrize("saved", ["decoder.layer_norm", "decoder.layers.0.final_layer_norm", "encoder.layers.1"])
    def test_a_module_is_trained_in_full_and_no_library_complains(
        self, tiny: Path, tones: Path, tmp_path: Path, saved: str
    ) -> None:
        spec = load(tmp_path, tiny, tones, modules_to_save=[saved], outdir=str(tmp_path / "run"), lr=0.01).spec
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=UserWarning)
            model, _ = attach(base_model(tiny), spec.training)
        full = {name for name, _ in trainable_parameters(model) if "lora_" not in name}
        inside = {name for name in base_model(tiny).state_dict() if name.startswith(f"model.{saved}.")}
        assert {name.removeprefix(PREFIX).replace(".modules_to_save.default", "") for name in full} == inside
        fill_adapters(model, 0.1)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(base_model(tiny), folder)
        batch = batch_of(tiny, tones / "val.csv", 3)
        assert float((logits_of(again, batch) - logits_of(model, batch)).abs().max()) < 1e-5

    REFUSED = (
        (["decoder"], {}, "holds the token embedding, which would come apart from the output head"),
        (["decoder.layers.0", "decoder.layers.0.fc1"], {}, '"decoder.layers.0.fc1" lies in decoder.layers.0, and that'),
        (["decoder.layers.1", "layer_norm"], {}, "matches decoder.layers.1.self_attn_layer_norm, which lies in"),
        (["layer_norm"], {"freeze_encoder": True}, "name the decoder's, such as decoder.layers.0.self_attn_layer_norm"),
        (["encoder.layer_norm"], {"freeze_encoder": True}, "lies in the encoder, and freeze_encoder leaves that"),
        (["proj_out"], {}, "is the same matrix as embed_tokens"),
    )

    @pytest.mark.setting("modules_to_save", "freeze_encoder")
    @pytest.mark.parametrize(("saved", "more", "says"), REFUSED, ids=["-".join(saved) for saved, _, _ in REFUSED])
    def test_what_could_not_be_saved_or_merged_is_refused_before_it_is_trained(
        self, tiny: Path, tones: Path, tmp_path: Path, saved: list[str], more: dict[str, Any], says: str
    ) -> None:
        targets = {"lora_target_modules": ["encoder.layers.0.fc1", "decoder.layers.0.encoder_attn.q_proj", "q_proj"]}
        assert says in refusal(tmp_path, tiny, tones, modules_to_save=saved, **targets, **more)


OFFLOADS: dict[str, dict[str, Any]] = {
    "switch": {"dora_ephemeral_offload": True},
    "object": {"lora_runtime_config": {"ephemeral_gpu_offload": True}},
    "JSON text": {"lora_runtime_config": '{"ephemeral_gpu_offload": true}'},
    "both": {"dora_ephemeral_offload": True, "lora_runtime_config": {"ephemeral_gpu_offload": True}},
    "switch and an empty object": {"dora_ephemeral_offload": True, "lora_runtime_config": "{}"},
}


class TestOffload:
    """dora_ephemeral_offload and lora_runtime_config. What a GPU does with them is in test_gpu.py."""

    @pytest.mark.setting("dora_ephemeral_offload", "lora_runtime_config")
    @pytest.mark.parametrize("has_gpu", [False, True], ids=["CPU", "GPU"])
    @pytest.mark.parametrize("settings", [{}, {"lora_runtime_config": {}}, *OFFLOADS.values()], ids=str)
    def test_peft_is_told_where_there_is_a_gpu(self, tiny: Path, settings: dict[str, Any], has_gpu: bool) -> None:
        training = TrainingConfig(use_dora=True, **settings)
        plan = plan_adapter(training, WhisperDims.from_config(base_model(tiny).config.to_dict()))
        told = lora_config(training, plan, on_gpu=has_gpu).runtime_config.ephemeral_gpu_offload
        assert told is (has_gpu and settings in OFFLOADS.values())

    @pytest.mark.setting("dora_ephemeral_offload", "lora_runtime_config")
    @pytest.mark.filterwarnings("error:.*offload")
    def test_without_a_gpu_it_changes_nothing_and_is_said(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        cpu = {"resources": {"gpus_per_worker": 0}}
        plain = Run(job(tiny, tones, tmp_path / "plain", cpu, use_dora=True))
        for name in ("switch", "JSON text"):
            run = Run(job(tiny, tones, tmp_path / name, cpu, use_dora=True, **OFFLOADS[name]))
            adapters = run.adapter(), plain.adapter()
            assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[1])
            (notice,) = events(run.session, "notice")
            assert "ephemeral_gpu_offload has no effect: this worker has no GPU" in notice["text"]
        assert events(plain.session, "notice") == []

    @pytest.mark.setting("dora_ephemeral_offload", "lora_runtime_config")
    def test_what_has_no_effect_is_pointed_out_before_the_job(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        def advice(name: str, *overrides: Override, **more: Any) -> list[str]:
            load(tmp_path, tiny, tones, **OFFLOADS[name], **more)
            return load_spec(tmp_path / "spec.json", list(overrides)).advice

        on_cpu = Override("resources.gpus_per_worker", 0, "--set")
        for name in ("switch", "object"):
            assert advice(name, use_dora=True) == []
            (line,) = advice(name, use_dora=False)
            assert "has no effect without use_dora" in line
            (line,) = advice(name, on_cpu, use_dora=True)
            assert "has no effect without a GPU" in line

    @pytest.mark.setting("dora_ephemeral_offload", "lora_runtime_config")
    def test_a_contradiction_is_an_error_and_the_config_alone_is_taken_at_its_word(
        self, tiny: Path, tones: Path, tmp_path: Path
    ) -> None:
        off = {"lora_runtime_config": {"ephemeral_gpu_offload": False}, "use_dora": True}
        said = refusal(tmp_path, tiny, tones, dora_ephemeral_offload=True, **off)
        assert "dora_ephemeral_offload: is on, and lora_runtime_config says ephemeral_gpu_offload is off" in said
        assert load(tmp_path, tiny, tones, **off).spec.training.ephemeral_gpu_offload is False
        assert "is not valid JSON" in refusal(tmp_path, tiny, tones, lora_runtime_config="{ephemeral")


@pytest.mark.setting("lora_init")
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("init", [True, None, "gaussian", "orthogonal", False])
def test_an_init_decides_where_training_begins(tiny: Path, tones: Path, init: Any, use_dora: bool) -> None:
    batch = batch_of(tiny, tones / "val.csv", 3)
    model = adapted(tiny, lora_init=init, use_dora=use_dora, lora_r=4)
    away = float((logits_of(model, batch) - logits_of(base_model(tiny), batch)).abs().max())
    assert (away < 1e-4) is (init is not False), "all but false begin at the base model"
    layer = layers(model)["model.encoder.layers.0.fc1"]
    a, b = (getattr(layer, factor)["default"].weight.detach() for factor in ("lora_A", "lora_B"))
    assert bool(b.any()) is (init in (False, "orthogonal"))
    if init == "gaussian":
        assert float(a.std()) == pytest.approx(1 / 4, rel=0.3)
    elif init == "orthogonal":
        assert float((b @ a).abs().max()) < 1e-6 < float(a.abs().max())
    else:
        assert float(a.abs().max()) <= 32**-0.5 < 1.1 * float(a.abs().max()), "uniform within 1 / sqrt(inputs)"


class TestPatterns:
    """lora_rank_pattern and lora_alpha_pattern: the first key that matches wins, and one must match."""

    ONE, OTHER = {"decoder.*": 2, "fc1": 8}, {"fc1": 8, "decoder.*": 2}

    @pytest.mark.setting("lora_rank_pattern", "lora_alpha_pattern")
    @pytest.mark.parametrize("setting", ["lora_rank_pattern", "lora_alpha_pattern"])
    def test_the_files_order_is_kept_on_every_way_in_and_counts(
        self, tiny: Path, tones: Path, tmp_path: Path, setting: str
    ) -> None:
        data = f"train_csv: {tones}/train.csv\nval_csv: {tones}/val.csv\nbase_model: {tiny}\n"
        hashes = []
        for pattern in (self.ONE, self.OTHER):
            text = json.dumps(pattern)
            yaml = "".join(f'  "{key}": {value}\n' for key, value in pattern.items())
            (tmp_path / "plain.yaml").write_text(data)
            (tmp_path / "block.yaml").write_text(f"{data}{setting}:\n{yaml}")
            (tmp_path / "text.yaml").write_text(f"{data}{setting}: '{text}'\n")
            flag = Override(f"training.{setting}", text, f"--{setting}")
            specs = [
                load_spec(tmp_path / "block.yaml").spec,
                load_spec(tmp_path / "text.yaml").spec,
                load_spec(tmp_path / "plain.yaml", [flag]).spec,
                load(tmp_path, tiny, tones, **{setting: pattern}).spec,
            ]
            (tmp_path / "resolved.json").write_text(specs[0].to_json())
            specs.append(load_spec(tmp_path / "resolved.json").spec)
            assert {tuple(getattr(spec.training, setting).items()) for spec in specs} == {tuple(pattern.items())}
            assert len({spec.sha256 for spec in specs}) == 1
            hashes.append(specs[0].sha256)
            found = layers(attach(base_model(tiny), specs[0].training)[0])["model.decoder.layers.1.fc1"]
            number = (found.r if "rank" in setting else found.lora_alpha)["default"]
            assert number == (2 if pattern is self.ONE else 8)
        assert hashes[0] != hashes[1]

    @pytest.mark.setting("lora_rank_pattern", "lora_alpha_pattern")
    @pytest.mark.parametrize("setting", ["lora_rank_pattern", "lora_alpha_pattern"])
    @pytest.mark.parametrize(
        ("key", "says"),
        [
            ("decoder.layers.0.encoder_attn.k_prj", "did you mean decoder.layers.0.encoder_attn.k_proj"),
            ("decoder.layers.5.fc1", "its decoder has 2 layers, 0 to 1"),
            ("conv1", "matches no module with an adapter"),
        ],
    )
    def test_a_key_that_matches_nothing_is_an_error(
        self, tiny: Path, tones: Path, tmp_path: Path, setting: str, key: str, says: str
    ) -> None:
        said = refusal(tmp_path, tiny, tones, **{setting: {"fc1": 8, key: 8}})
        assert setting in said
        assert says in said
