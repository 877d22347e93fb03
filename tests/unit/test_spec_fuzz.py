"""Whatever a file or a command line holds: a spec or a SpecError, never anything else."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from service.errors import SpecError
from service.plan import make_plan
from service.spec.flags import overrides_of
from service.spec.load import load_spec
from service.spec.settings import sections, settings

quick = hypothesis_settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

names = st.sampled_from([s.name for s in settings().values()] + list(sections()) + ["lora_rank", "$schema", "x"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["q_proj", "fc1", "(", ".*", "{", "[]", '{"fc1": 1}', "5e-5", "true", "./", "~", "s3://x", "\\"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=5), inner, max_size=3)
)
contents = st.dictionaries(names, values, max_size=6) | values


def load_or_refuse(*arguments):
    """Load and plan, or be refused with faults that can be printed."""
    try:
        loaded = load_spec(*arguments)
    except SpecError as error:
        assert error.faults
        assert str(error)
        json.dumps([str(fault) for fault in error.faults])
        return
    json.dumps(make_plan(loaded.spec).as_dict())


@quick
@given(contents)
@example({"training": {"lora_rank_pattern": {"(?i)x": 3}}})
@example({"training": {"lora_rank_pattern": {"a{99999999999999}": 3}}})
@example({"lora_target_modules": "(" * 5000})
@example({"lora_target_modules": ["\\"]})
@example({"modules_to_save": [""]})
@example({"modules_to_save": ["("]})
@example({"base_model": "a" * 5000})
@example({"train_csv": "a" * 5000, "outdir": "b" * 5000})
@example({"evaluation": {"model": "~nobody-at-all/x"}})
@example({"storage": {"uri": "~nobody-at-all/x"}})
@example({"resources": {"gpus_per_worker": float("inf")}})
def test_any_json_is_a_spec_or_is_refused(folder, content):
    path = folder / "junk.json"
    path.write_text(json.dumps(content))

    load_or_refuse(path)


@quick
@given(contents)
def test_any_yaml_is_a_spec_or_is_refused(folder, content):
    path = folder / "junk.yaml"
    path.write_bytes(yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))

    load_or_refuse(path)


@quick
@given(st.binary(max_size=200) | st.text(alphabet="{}[]:,-\n \t'\"&*!|>#%@`ab1.~<?", max_size=60).map(str.encode))
@pytest.mark.parametrize("suffix", [".yaml", ".json", ""])
def test_any_bytes_are_a_spec_or_are_refused(folder, suffix, content):
    path = folder / f"junk{suffix}"
    path.write_bytes(content)

    load_or_refuse(path)


@quick
@given(
    st.dictionaries(
        st.sampled_from([f"setting.{path}" for path in settings()]),
        st.lists(st.text(max_size=15), max_size=2),
        max_size=3,
    ),
    st.lists(st.text(max_size=10) | st.tuples(names, st.text(max_size=8)).map("=".join), max_size=3),
)
def test_any_flags_are_a_spec_or_are_refused(folder, flags, assignments):
    load_or_refuse(None, overrides_of(flags, assignments))


@pytest.mark.parametrize("source", ["", ".", "/", "a\0b", "x" * 5000, "/dev/null/x"])
def test_any_path_is_read_or_refused(folder, source):
    load_or_refuse(Path(source))
