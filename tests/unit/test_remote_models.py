"""A model or dataset whose name is the URI of a folder is the one that lies there; its name stays the URI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from engine import job, tone
from objectstore import BUCKET, Server

from jobs.adapter import attach
from jobs.card import card_metadata
from jobs.export.hf import write_hf
from jobs.inputs import require_same_inputs
from jobs.manifest.from_spec import build_from_dataset
from jobs.model import at_hand, describe_base, load_dims, load_processor, load_prompter, load_whisper
from jobs.sources import adapter_folder, open_source, resolve_model
from service.errors import InputError, SpecError
from service.spec.job import JobSpec
from service.spec.load import load_spec
from service.storage import Storage
from service.upload import plan_uploads, upload, uploads_uri

pytestmark = pytest.mark.usefixtures("client")


@pytest.fixture
def base(tiny: Path, prefix: str) -> str:
    """`tiny` in object storage."""
    root = Storage(f"s3://{BUCKET}/{prefix}/tiny-whisper")
    for path in tiny.iterdir():
        root.put_file(path, path.name)
    root.write_text("README.md", "---\nlicense: cc0-1.0\n---\n")
    return root.uri


def test_every_loader_takes_a_uri_and_gives_what_the_folder_gives(tiny: Path, base: str, tmp_path: Path) -> None:
    near, far = load_whisper(str(tiny)), load_whisper(base)
    one, other = near.model.state_dict(), far.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert far.name == far.model.name_or_path == base
    assert load_dims(base) == load_dims(str(tiny))
    assert load_prompter(base).max_tokens == load_prompter(str(tiny)).max_tokens
    assert load_processor(base).tokenizer.get_vocab() == load_processor(str(tiny)).tokenizer.get_vocab()
    described = describe_base(base)
    assert (described.name, described.revision) == (base, None)
    assert described.weights_sha256 == describe_base(str(tiny)).weights_sha256
    for name, source in (("near", str(tiny)), ("far", base)):
        (tmp_path / name).mkdir()
        write_hf(source, None, tmp_path / name)
    for path in (tmp_path / "near").iterdir():
        assert path.read_bytes() == (tmp_path / "far" / path.name).read_bytes()
    assert "license: cc0-1.0" in card_metadata("job", described, ["en"], "peft", "adapter")


def test_an_adapter_trained_on_it_names_the_uri_and_is_found_on_it_again(
    base: str, prefix: str, tmp_path: Path
) -> None:
    adapted, _ = attach(load_whisper(base).model, JobSpec().training)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    named = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == base
    root = Storage(f"s3://{BUCKET}/{prefix}/adapter")
    for path in (tmp_path / "adapter").iterdir():
        root.put_file(path, path.name)
    found = resolve_model(root.uri)
    assert found == {"base": base, "revision": None, "adapter": root.uri, "run": None}
    assert adapter_folder(root.uri).joinpath("adapter_model.safetensors").is_file()
    assert open_source(found).base == base
    assert resolve_model(base) == {"base": base, "revision": None, "adapter": None, "run": None}


def test_one_that_is_not_there_or_not_whole_is_named(base: str, server: Server, prefix: str) -> None:
    with pytest.raises(SpecError, match=r'training\.base_model: "s3://speech/.*/none" holds no file'):
        load_whisper(base.replace("tiny-whisper", "none"))
    with pytest.raises(SpecError, match=r"data\.dataset: .* is a file"):
        at_hand(f"{base}/config.json", "data.dataset")
    server.s3.delete_object(Bucket=BUCKET, Key=f"{prefix}/tiny-whisper/model.safetensors")
    with pytest.raises(SpecError, match=rf'"{base}" is no complete Whisper checkpoint'):
        load_whisper(base)


def test_a_spec_may_name_uris_of_stores_and_no_others(tones: Path, base: str) -> None:
    def spec(**training: Any) -> dict[str, Any]:
        csvs = {"train_csv": str(tones / "train.csv"), "val_csv": f"s3://{BUCKET}/val.csv"}
        return {"training": csvs | training}

    loaded = load_spec(None, base=spec(base_model=base))
    assert (loaded.spec.training.base_model, loaded.spec.title) == (base, "tiny-whisper-lora")
    assert "its modules are checked where the job runs" in " ".join(loaded.advice)
    load_spec(None, base=spec(base_model="gs://models/whisper-small.en"))
    with pytest.raises(SpecError, match=r"ftp://models/x.* is a URI of a kind that is not known; give a hub id"):
        load_spec(None, base=spec(base_model="ftp://models/x"))
    evaluation = {"kind": "evaluate", "evaluation": {"model": base, "csv": f"s3://{BUCKET}/val.csv"}}
    assert load_spec(None, base=evaluation).spec.evaluation.model == base


@pytest.mark.parametrize("changed", ["train.csv", "tiny-whisper/model.safetensors"])
def test_an_input_in_storage_that_changes_in_mid_run_is_named_and_refused(
    base: str, prefix: str, server: Server, tmp_path: Path, changed: str
) -> None:
    root = Storage(f"s3://{BUCKET}/{prefix}")
    for name in ("train.csv", "val.csv"):
        root.write_text(name, "path,text\na.wav,one\n")
    csvs = {"train_csv": root.path("train.csv"), "val_csv": root.path("val.csv")}
    spec = job(base, tmp_path, tmp_path / "run", **csvs)

    def start() -> None:
        require_same_inputs(spec, Storage(spec.root))
        Storage(spec.root).write_json("stages/prepare.json", {})

    start()
    root.write_bytes(changed, root.read_bytes(changed))  # of the same content
    start()
    server.s3.put_object(Bucket=BUCKET, Key=f"{prefix}/{changed}", Body=b"path,text\nb.wav,two\n")
    with pytest.raises(InputError, match="has changed since the run in") as caught:
        start()
    assert [fault.where for fault in caught.value.faults] == [root.path(changed)]


def test_a_dataset_that_was_sent_is_built_from_like_the_folder(tiny: Path, prefix: str, tmp_path: Path) -> None:
    import datasets

    clips = []
    for number in range(12):
        soundfile.write(tmp_path / f"{number}.wav", tone(0.4, 200 + 90 * number), 16_000)
        clips.append({"path": None, "bytes": (tmp_path / f"{number}.wav").read_bytes()})
    table = {"audio": clips, "sentence": [f"sentence {number}" for number in range(12)]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "set")
    data = {"dataset": str(tmp_path / "set"), "val_ratio": 0.3}
    content = {"data": data, "training": {"base_model": str(tiny)}, "storage": {"uri": f"s3://{BUCKET}/{prefix}"}}
    before = JobSpec.model_validate(content)
    uri = uploads_uri(before)
    after = upload(plan_uploads(before, uri), Storage(uri))
    assert str(after.data.dataset).startswith(f"{uri}/datasets/")
    for name, spec in (("near", before), ("far", after)):
        build_from_dataset(spec, tmp_path / name, lambda rows: None)
    for split in ("train.csv", "val.csv"):
        assert (tmp_path / "near" / split).read_bytes() == (tmp_path / "far" / split).read_bytes()
