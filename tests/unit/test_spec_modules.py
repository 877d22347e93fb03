"""The module table against transformers' own model, and what is known of a checkpoint without loading it."""

import json

import pytest
from transformers import WhisperConfig
from whisper_shapes import NANO, meta_whisper

from service.spec.whisper_dims import OPENAI, NotWhisperError, WhisperDims, dims_of
from service.spec.whisper_modules import modules, total_parameters

SHAPES = {"nano": NANO} | {
    name: OPENAI[f"openai/whisper-{name}"]
    for name in ("tiny", "tiny.en", "base", "small.en", "medium", "large-v2", "large-v3", "large-v3-turbo")
}
KINDS = {"Linear": "linear", "Conv1d": "conv1d", "Embedding": "embedding", "LayerNorm": "layer_norm"}
KINDS |= {"WhisperPositionalEmbedding": "embedding", "GELUActivation": "activation", "ModuleList": "list"}


@pytest.mark.parametrize("dims", SHAPES.values(), ids=SHAPES)
def test_the_table_has_every_module_of_transformers_with_its_shape(dims):
    model = meta_whisper(dims)
    expected = {}
    for name, module in model.named_modules():
        if name:
            kind = KINDS.get(type(module).__name__, "container")
            shape = (getattr(module, "in_features", None), getattr(module, "out_features", None))
            if kind == "conv1d":
                shape = (module.in_channels, module.out_channels)
            if kind == "embedding":
                shape = (module.num_embeddings, module.embedding_dim)
            if kind == "layer_norm":
                shape = (dims.d_model, dims.d_model)
            bias = getattr(module, "bias", None) is not None
            shape = shape if shape[0] else (0, 0)
            expected[name] = (kind, *shape, bias, sum(parameter.numel() for parameter in module.parameters()))

    found = {m.name: (m.kind, m.in_features, m.out_features, m.bias, m.parameters) for m in modules(dims)}

    assert found == expected
    assert [m.name for m in modules(dims) if m.kind == "conv1d" and m.kernel == 3] == [
        "model.encoder.conv1",
        "model.encoder.conv2",
    ]


@pytest.mark.parametrize("dims", SHAPES.values(), ids=SHAPES)
def test_the_total_is_what_transformers_counts(dims):
    assert total_parameters(dims) == meta_whisper(dims).num_parameters()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 37.8),
        ("base", 72.6),
        ("small", 241.7),
        ("medium", 763.9),
        ("medium.en", 763.9),
        ("large-v2", 1543.3),
        ("large-v3", 1543.5),
        ("large-v3-turbo", 808.9),
    ],
)
def test_openai_checkpoints_have_their_published_sizes(name, millions):
    assert total_parameters(OPENAI[f"openai/whisper-{name}"]) / 1e6 == pytest.approx(millions, abs=0.06)


def test_english_only_is_seen_by_the_vocabulary():
    assert {name for name, dims in OPENAI.items() if dims.english_only} == {n for n in OPENAI if n.endswith(".en")}


def write_config(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "whisper", "d_model": 96, **values}))
    return folder


def test_a_folder_is_read_by_its_config(tmp_path):
    write_config(tmp_path, decoder_layers=2)

    assert dims_of(str(tmp_path)) == WhisperDims(d_model=96, decoder_layers=2)
    config = WhisperConfig(d_model=96, decoder_layers=2)
    assert dims_of(str(tmp_path)) == WhisperDims.from_config(config.to_dict())


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_cached_hub_model_is_read_at_the_commit_of_main(tmp_path, monkeypatch, variable):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    below = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}[variable]
    model = tmp_path / below / "models--someone--whisper-tuned"
    write_config(model / "snapshots" / "old", d_model=32)
    write_config(model / "snapshots" / "new", d_model=64)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("old")

    assert dims_of("someone/whisper-tuned").d_model == 32


def test_a_hub_model_that_is_not_on_this_machine_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    assert dims_of("someone/whisper-tuned") is None


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no config.json"),
        ({"config.json": "{"}, "not the one of a transformers checkpoint"),
        ({"config.json": "[]"}, "not the one of a transformers checkpoint"),
        ({"config.json": '{"model_type": "wav2vec2"}'}, "'wav2vec2' model, not a Whisper"),
        ({"config.json": '{"model_type": "whisper", "d_model": "x"}'}, "d_model is 'x'"),
        ({"adapter_config.json": "{}"}, "holds a PEFT adapter"),
        ({"merged/config.json": "{}"}, "is the root of a run"),
    ],
)
def test_a_folder_without_a_whisper_says_what_it_is(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    with pytest.raises(NotWhisperError, match=says):
        dims_of(str(tmp_path))
