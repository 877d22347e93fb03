"""The section `export`: names of formats, what they need, and what they exclude, said before anything starts."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from engine import job

from jobs import tasks
from service.errors import InfeasibleError, SpecError
from service.spec.checks import findings, require_model
from service.spec.export import ARTIFACTS, FAMILIES, ExportConfig, missing_extras, shape_faults
from service.spec.flags import Override
from service.spec.job import JobSpec
from service.spec.load import load_spec
from service.spec.whisper_dims import OPENAI, WhisperDims


def spec_of(formats: list[str], **changes: Any) -> JobSpec:
    sections = {"export": {"formats": formats} | changes.pop("export", {})}
    return job("openai/whisper-tiny", Path("/data"), Path("/runs/one"), sections, **changes)


def fatal(spec: JobSpec) -> list[str]:
    return [str(found.fault(found.settings[0])) for found in findings(spec, check_files=False) if found.fatal]


def test_a_family_means_its_first_precision_and_doubles_fall_out() -> None:
    assert ExportConfig(formats=["ggml", "ggml-f16", "ctranslate2", "openai"]).formats == [
        "ggml-f16",
        "ctranslate2-float16",
        "openai",
    ]


@pytest.mark.parametrize(
    ("name", "hint"), [("gmml", "did you mean ggml"), ("ggml-q8", "did you mean ggml-q8_0"), ("onnx", "known are hf")]
)
def test_an_unknown_format_is_an_error_that_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(SpecError, match=f"{name}, which is no format; {hint}") as caught:
        load_spec(None, [Override("export.formats", [name], "--set export.formats")])
    assert any("export.formats" in fault.where for fault in caught.value.faults)


def test_formats_are_made_from_the_merged_model() -> None:
    assert fatal(spec_of(["hf", "ggml"])) == []
    assert fatal(spec_of(["hf"], merge_lora=False)) == []
    (fault,) = fatal(spec_of(["hf", "ggml"], merge_lora=False))
    assert "merge_lora is off; switch it on" in fault


@pytest.mark.parametrize("name", OPENAI)
def test_every_format_has_a_place_for_every_checkpoint_of_openai(name: str) -> None:
    assert [shape_faults(artifact, OPENAI[name]) for artifact in ARTIFACTS] == [[]] * len(ARTIFACTS)


@pytest.mark.parametrize(
    ("artifact", "dims", "why"),
    [
        ("ggml-f16", {"max_source_positions": 750}, "750 positions"),
        ("openai", {"vocab_size": 51900}, "51900 tokens"),
        ("ggml-q5_0", {"d_model": 400, "encoder_ffn_dim": 1600, "decoder_ffn_dim": 1600}, "rows of 400"),
        ("openai", {"decoder_ffn_dim": 384}, "widen 384 to 384"),
    ],
)
def test_a_model_of_another_shape_is_refused_before_it_is_trained(
    artifact: str, dims: dict[str, int], why: str
) -> None:
    (fault,) = shape_faults(artifact, WhisperDims(**dims))
    assert why in fault
    with pytest.raises(SpecError, match=f"{artifact}, which cannot hold this model: .*{why}"):
        require_model(spec_of([artifact]), WhisperDims(**dims))
    assert shape_faults("ctranslate2-int8", WhisperDims(**dims)) == [], "it takes any shape"


def test_a_missing_library_is_named_with_its_extra_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_extras(list(ARTIFACTS), lambda name: True) == {}
    assert missing_extras(["ggml-f16", "ggml-q8_0"], lambda name: name != "gguf") == {"ggml": ["gguf"]}
    absent = {"faster_whisper", "whisper"}
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None if name in absent else name)
    with pytest.raises(InfeasibleError) as caught:
        tasks.check_exports(["hf", "ggml-f16", "ctranslate2-int8", "openai"])
    assert "faster_whisper, whisper" in str(caught.value)
    assert 'pip install ".[ctranslate2,openai]" in the checkout' in str(caught.value)
    tasks.check_exports(["hf", "ggml-f16"])


def test_every_extra_of_a_format_exists() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for family in FAMILIES.values():
        listed = " ".join(extras[family.extra]).replace("-", "_")
        assert all(package in listed for package in family.packages)


def test_an_export_job_needs_a_source_and_clips(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"export\.source.*is missing"):
        load_spec(None, [Override("kind", "export", "export")])
    given = [Override("kind", "export", "export"), Override("export.source", str(tmp_path), "SOURCE")]
    with pytest.raises(SpecError, match=r"is no run \(adapter/adapter_config.json\)"):
        load_spec(None, given)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SpecError, match="no export leaves without having been heard"):
        load_spec(None, given)
    with pytest.raises(SpecError, match="does not exist"):
        load_spec(None, [given[0], Override("export.source", str(tmp_path / "none"), "SOURCE")])
