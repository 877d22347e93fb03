"""README and docs/ against the program: specs load, commands and flags exist, tables are true, links lead somewhere."""

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
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/SETTINGS.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
INDENTED = re.compile(r"^ {4,}(whisper-jobs .+)$", re.MULTILINE)
COMMAND_LINES = sorted(
    {
        line
        for text in (README, *DOCS.values())
        for line in [
            *INDENTED.findall(text),
            *re.findall(r"^whisper-jobs .+$", "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)), re.MULTILINE),
        ]
    }
)


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


def test_the_guard_that_is_shown_has_the_limits_that_are_the_defaults() -> None:
    block = re.search(r"```yaml\n(guard:.*?)```", DOCS["training"], re.DOTALL)
    assert block
    shown = yaml.safe_load(block[1])["guard"]
    assert GuardConfig(csv=shown["csv"]) == GuardConfig(**shown)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_and_flag_in_the_documents_exists(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    group = Commands(name="whisper-jobs")
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, words[0]
    if isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words[1])
        assert command is not None
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_documents_show_every_command_but_schema() -> None:
    assert {shlex.split(line)[1] for line in COMMAND_LINES} >= set(COMMANDS) - {"schema", "explain", "completion"}
    first = re.findall(r"^ {4}whisper-jobs (\w+)", README, re.MULTILINE)
    assert set(first) >= {"manifest", "validate", "run", "verify", "evaluate"}


def test_the_first_commands_are_make_demo_and_make_test() -> None:
    first = re.findall(r"^ {4}(.+?)(?:\s{2,}#.*)?$", README, re.MULTILINE)[:2]
    assert first == ["make demo", "make test"]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_the_block_of_exports_is_valid_and_shows_the_defaults() -> None:
    block = re.search(r"```yaml\n(export:.*?)```", DOCS["exports"], re.DOTALL)
    assert block
    shown = yaml.safe_load(block[1])["export"]
    formats = ExportConfig(formats=shown.pop("formats")).formats
    assert formats == JobSpec.model_validate(yaml.safe_load(DEMO.read_text())).export.formats
    assert shown == {name: getattr(ExportConfig(), name) for name in shown}


def test_the_tables_of_formats_name_them_all() -> None:
    chapter = DOCS["exports"]
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


def anchors(page: Path) -> set[str]:
    """What may stand behind the # of a link to a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page_and_is_read_in_ten_minutes() -> None:
    assert [name for name in DOCS if f"(docs/{name}.md)" not in README] == []
    assert len(README.split()) <= 3000


@pytest.mark.parametrize("folder", ["k8s", "docker", "configs"])
def test_every_page_that_a_comment_names_exists(folder: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.yaml")]
    named = {name for text in texts for name in re.findall(r"\bdocs/[\w-]+\.md\b", text)}
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_newcomer_has_the_command_on_the_path_before_the_first_use() -> None:
    lines = re.findall(r"^ {4}(\S.*)$", README, re.MULTILINE)
    first = next(index for index, line in enumerate(lines) if line.startswith("whisper-jobs "))
    assert ". .venv/bin/activate" in lines[:first]


def test_a_make_target_takes_as_long_in_all_documents() -> None:
    told = re.compile(
        r"^(?:# |    )make ([\w-]+) .*\((?:.*[;,] )?([^();,]*\b(?:minutes|hour)\b)[^()]*\)$", re.MULTILINE
    )
    times = dict(told.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
    assert {"bench", "test-faults", "test-jobs", "test-cluster"} <= set(times)
    contributing = dict(told.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert len(contributing) > 3
    assert {name: times[name] for name in contributing} == contributing
    for text in (README, DOCS["speed"]):
        assert f"`make bench` takes {times['bench']}" in text
    assert f"`make test-faults` runs all of them, in {times['test-faults']}." in DOCS["faults"]


def test_every_fault_in_the_table_names_tests_that_exist() -> None:
    rows = [row for row in DOCS["faults"].splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 50
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.split("|")[4])
        assert names, row
        assert [name for name in names if f"def {name}(" not in sources] == []
