"""The README's words against the program: its spec loads, its commands and flags exist, its tables are true."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from jobs.export.table import HEADER
from service import errors
from service.cli.main import COMMANDS, Commands
from service.spec.export import ARTIFACTS, FAMILIES, ExportConfig
from service.spec.guard import GuardConfig
from service.spec.job import JobSpec
from service.spec.load import load_spec

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/demo.yaml"
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_LINES = re.findall(r"^ {4}(whisper-jobs .+)$", README, re.MULTILINE)


def test_the_spec_in_the_readme_is_valid(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block
    spec = tmp_path / "turbo.yaml"
    spec.write_text(block[1])
    loaded = load_spec(spec, check_files=False).spec
    assert loaded.training.base_model == "openai/whisper-large-v3-turbo"
    effective = loaded.training.clips_per_step * loaded.resources.workers
    assert f"= {effective} clips in an optimizer step" in block[1]
    full = yaml.safe_load((ROOT / "configs/train_lora.yaml").read_text())["training"]
    shortened = yaml.safe_load(block[1])["training"]
    assert {key: full.get(key, False) for key in shortened} == shortened


def test_the_guard_in_the_readme_has_the_limits_that_are_the_defaults() -> None:
    block = re.search(r"```yaml\n(guard:.*?)```", README, re.DOTALL)
    assert block
    shown = yaml.safe_load(block[1])["guard"]
    assert GuardConfig(csv=shown["csv"]) == GuardConfig(**shown)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_and_flag_in_the_readme_exists(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    group = Commands(name="whisper-jobs")
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, words[0]
    if isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words[1])
        assert command is not None
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_readme_has_command_lines() -> None:
    assert {shlex.split(line)[1] for line in COMMAND_LINES} >= {"manifest", "validate", "run", "verify", "evaluate"}
    assert all(shlex.split(line)[1] in COMMANDS for line in COMMAND_LINES)


def test_the_first_commands_are_make_demo_and_make_test() -> None:
    first = re.findall(r"^ {4}(.+?)(?:\s{2,}#.*)?$", README, re.MULTILINE)[:2]
    assert first == ["make demo", "make test"]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_the_block_of_exports_is_valid_and_shows_the_defaults() -> None:
    block = re.search(r"```yaml\n(export:.*?)```", README, re.DOTALL)
    assert block
    shown = yaml.safe_load(block[1])["export"]
    formats = ExportConfig(formats=shown.pop("formats")).formats
    assert formats == JobSpec.model_validate(yaml.safe_load(DEMO.read_text())).export.formats
    assert shown == {name: getattr(ExportConfig(), name) for name in shown}


def test_the_tables_of_formats_name_them_all() -> None:
    chapter = README.split("## Exports, each heard")[1].split("\n## ")[0]
    for name, (family, precision) in ARTIFACTS.items():
        assert f"`{name}`" in chapter or f"`-{precision}`" in chapter, name
        assert f"`.[{FAMILIES[family].extra}]`" in chapter
    generated = chapter.split("<!-- exports -->\n")[1].split("<!-- /exports -->")[0]
    rows = [line.split("|")[1].strip() for line in generated.splitlines() if line.startswith("| ")][1:]
    assert rows == JobSpec.model_validate(yaml.safe_load(DEMO.read_text())).export.formats
    assert generated.startswith("| " + " | ".join(HEADER[:8]))


def test_the_exit_codes_in_the_readme_are_those_of_the_errors() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    classes = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.WhisperJobsError)
    ]
    assert listed == {kind.exit_code for kind in classes} | {errors.EXIT_DONE, errors.EXIT_INTERRUPTED}


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_fault_in_the_readme_names_tests_that_exist() -> None:
    section = README.split("## When something goes wrong")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 15
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.split("|")[4])
        assert names, row
        assert [name for name in names if f"def {name}(" not in sources] == []
