"""Who may import whom. Read from the source, so that no lazy import escapes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STDLIB = set(sys.stdlib_module_names)
HEAVY = {"torch", "transformers", "ray", "peft", "accelerate", "datasets", "numpy", "jiwer", "soundfile", "soxr"}

PURE = ["service/spec", "service/errors.py", "service/artifacts.py"]
FOR_JOBS = (
    "service.spec",
    "service.errors",
    "service.artifacts",
    "service.activations",
    "service.memory",
    "service.plan",
    "service.storage",
    "service.trials",
    "service.report",
    "service.writing",
)
"""What jobs may import of service."""


def imports(path, *, top_level_only=False):
    """Every module that a file imports, with its line."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def files(*places):
    """The Python files at these places of the repository."""
    for place in places:
        path = ROOT / place
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def offences(places, allowed, **options):
    """Imports that a rule does not allow, each as `file:line: module`."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in files(*places)
        for module, line in imports(path, **options)
        if not allowed(module, path)
    ]


def test_the_spec_errors_and_artifacts_need_only_pydantic():
    def allowed(module, path):
        package = module.split(".")[0]
        if package in STDLIB | {"pydantic", "pydantic_core"}:
            return True
        if package == "yaml":
            return path.name == "read.py"
        return module.startswith(("service.spec", "service.errors", "service.artifacts"))

    assert offences(PURE, allowed) == []


def test_yaml_is_imported_on_use():
    assert offences(["service"], lambda module, path: module.split(".")[0] != "yaml", top_level_only=True) == []


def test_the_storage_knows_nothing_of_client_and_commands():
    pure = ("service.spec", "service.errors", "service.artifacts", "service.storage")

    assert offences(["service/storage"], lambda m, p: not m.startswith("service") or m.startswith(pure)) == []


def test_the_report_reads_roots_and_knows_nothing_of_client_and_commands():
    assert offences(["service/report"], lambda m, p: not m.startswith("service") or m.startswith(FOR_JOBS)) == []


def test_only_commands_import_commands():
    everything_else = [p.relative_to(ROOT) for p in files("service", "jobs") if p.parent.name != "cli"]

    assert offences(everything_else, lambda module, path: not f"{module}.".startswith("service.cli.")) == []


def test_only_commands_and_the_client_itself_import_the_client():
    others = [
        p.relative_to(ROOT) for p in files("service", "jobs") if p.parent.name not in ("cli", "client", "kubernetes")
    ]

    assert offences(others, lambda module, path: not f"{module}.".startswith("service.client.")) == []


def test_the_client_of_a_cluster_is_imported_on_use():
    heavy = ("service.client", "httpx2", "websockets", "packaging")

    assert offences(["service/cli"], lambda module, path: not module.startswith(heavy), top_level_only=True) == []


def test_jobs_import_only_the_pure_part_and_the_storage_of_service():
    def allowed(module, path):
        return not module.startswith("service") or module.startswith(FOR_JOBS)

    assert offences(["jobs"], allowed) == []


def test_the_client_imports_nothing_of_jobs_and_none_of_its_libraries():
    assert offences(["service"], lambda module, path: module.split(".")[0] not in HEAVY | {"jobs"}) == []


@pytest.mark.parametrize("module", ["service.cli.main", "service.spec.load", "service.plan", "service.artifacts"])
def test_importing_the_client_loads_no_heavy_library(module):
    unwanted = HEAVY | {"rich", "yaml", "fsspec", "httpx2", "websockets", "jinja2", "plotly", "rapidfuzz"}
    code = f"""
import sys, {module}
loaded = {unwanted!r} & set(sys.modules)
assert not loaded, loaded
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert result.returncode == 0, result.stderr
