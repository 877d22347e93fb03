"""Each setting of `training` has a test that shows its effect, marked `setting("its name")`: read from the source."""

import ast
from pathlib import Path

import pytest

from service.spec.settings import settings

TESTS = Path(__file__).parents[1]
NAMES = {setting.name for setting in settings().values() if setting.section == "training"}
ELSEWHERE = {path for path in settings() if not path.startswith("training.")}
"""Settings of other sections may be marked too, by their paths: `setting("engine.attention")`."""


def marks(node):
    """The markers on a function or class: {name: arguments}."""
    for decorator in node.decorator_list:
        call = decorator if isinstance(decorator, ast.Call) else ast.Call(decorator, [], [])
        if ast.unparse(call.func).startswith("pytest.mark."):
            yield call.func.attr, [ast.literal_eval(argument) for argument in call.args if is_plain(argument)]


def is_plain(node):
    """Whether an argument is a plain value."""
    return isinstance(node, ast.Constant)


def covered(source):
    """What a file's `setting` markers name: {name: [tests that run without a GPU]}.

    Raises:
        AssertionError: a marker is on something that pytest does not collect.
    """
    found = {}
    todo = [(ast.parse(source), False)]
    while todo:
        node, on_gpu = todo.pop()
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef):
                continue
            here = list(marks(child))
            gpu = on_gpu or any(name == "gpu" for name, _ in here)
            named = [name for mark, names in here if mark == "setting" for name in names]
            assert not named or child.name.startswith(("test_", "Test")), f"{child.name} is no test"
            for name in named:
                found.setdefault(name, []).extend([] if gpu else [child.name])
            if isinstance(child, ast.ClassDef):
                todo.append((child, gpu))
    return found


@pytest.fixture(scope="module")
def tests():
    """All markers: {name of a setting: [its tests]}."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name, functions in covered(path.read_text("utf-8")).items():
            found.setdefault(name, []).extend(f"{path.name}::{function}" for function in functions)
    return found


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_test_shows_the_effect_of_each_setting(tests, name):
    assert tests.get(name), f'no test that runs without a GPU is marked @pytest.mark.setting("{name}")'


def test_a_marker_names_a_setting(tests):
    assert set(tests) <= NAMES | ELSEWHERE


SOURCE = """
@pytest.mark.setting("lr", "seed")
@pytest.mark.parametrize("x", [1])
def test_one(x): ...

@pytest.mark.slow
@pytest.mark.setting("epochs")
class TestMore:
    @pytest.mark.gpu
    @pytest.mark.setting("fp16")
    def test_two(self): ...

def helper():
    '''@pytest.mark.setting("bf16")'''
"""


def test_markers_are_found_on_tests_alone():
    found = covered(SOURCE)

    assert found == {"lr": ["test_one"], "seed": ["test_one"], "epochs": ["TestMore"], "fp16": []}
    with pytest.raises(AssertionError, match="fixture_one is no test"):
        covered('@pytest.mark.setting("lr")\ndef fixture_one(): ...')
