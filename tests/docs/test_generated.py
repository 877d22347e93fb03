"""What is generated is up to date, and what is shipped is valid."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from service import docs
from service.errors import WhisperJobsError
from service.plan import make_plan
from service.spec.load import load_spec
from service.spec.settings import settings

CONFIGS = Path(__file__).parents[2] / "configs"
SPECS = sorted(path for path in CONFIGS.iterdir() if path.suffix in {".json", ".yaml"} and path.name != "schema.json")


@pytest.mark.parametrize("path", docs.documents(), ids=lambda path: path.name)
def test_a_generated_document_is_up_to_date(path):
    assert path.read_text("utf-8") == docs.documents()[path], "run python -m service.docs"


def test_the_reference_has_every_setting_and_exit_code():
    text = docs.settings_markdown()

    for setting in settings().values():
        assert f"### `{setting.name}`" in text
        assert setting.doc in text
        assert len(setting.doc) > 10
    assert all(f"\n| {code} | {meaning} |" in text for code, meaning in docs.exit_codes().items())


def test_the_exit_codes_of_the_reference_are_those_of_the_readme():
    readme = (CONFIGS.parent / "README.md").read_text("utf-8").split("\n| code | meaning |\n", 1)[1].split("\n\n", 1)[0]
    told = {int(row.split("|")[1]): row.split("|")[2].strip() for row in readme.splitlines()[1:]}

    assert list(docs.exit_codes()) == list(told)
    assert set(told) >= {kind.exit_code for kind in every_error(WhisperJobsError)}
    for words in ("Ctrl-C, with a checkpoint", "goes on"):
        assert words in told[130]
        assert words in docs.exit_codes()[130]


def every_error(kind):
    """An error's subclasses, all the way down."""
    return {kind}.union(*map(every_error, kind.__subclasses__()))


def test_every_choice_of_a_default_belongs_to_a_setting():
    assert set(docs.CHOICES) <= set(settings())


def content_of(path):
    """A config as plain values."""
    return json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_a_shipped_config_is_valid_and_gives_no_warning_but_of_its_model(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    loaded = load_spec(path, check_files=False)

    assert loaded.rewritten == []
    assert [line for line in loaded.advice if "is not on this machine" not in line] == []
    assert make_plan(loaded.spec).kind == loaded.spec.kind
    for name in ("train_csv", "val_csv"):
        folder = tmp_path / Path(getattr(loaded.spec.training, name)).parent.relative_to(tmp_path)
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / getattr(loaded.spec.training, name)).write_text("path,text\na.wav,hi\n")
    assert load_spec(path).spec == loaded.spec


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_a_shipped_config_fits_the_schema(path):
    jsonschema.validate(content_of(path), json.loads((CONFIGS / "schema.json").read_text()))


@pytest.mark.parametrize(
    "content",
    [{"lora_r": 0}, {"lora_rnk": 4}, {"training": {"lora_r": 0}}, {"training": {}, "lora_r": 4}, {"kind": "trian"}],
)
def test_the_schema_refuses_what_is_wrong(content):
    schema = json.loads((CONFIGS / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_the_config_of_the_old_toolkit_is_flat_and_has_every_key():
    content = json.loads((CONFIGS / "train_whisper_lora.json").read_text())

    assert set(content) == {setting.name for setting in settings().values() if setting.section == "training"}
