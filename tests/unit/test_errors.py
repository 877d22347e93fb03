"""Every error crosses process borders whole, and each has the exit code that the docs name."""

from __future__ import annotations

import pickle

import pytest

from service import errors
from service.errors import Fault, InputError, ManifestError, SpecError, WhisperJobsError

CODES = {
    "InputError": 2,
    "SpecError": 2,
    "ManifestError": 2,
    "ExistsError": 2,
    "JobFailedError": 3,
    "StoppedError": 4,
    "NotFoundError": 5,
    "NotFinishedError": 6,
    "UnauthorisedError": 7,
    "UnreachableError": 8,
    "InfeasibleError": 9,
    "RefusedError": 17,
    "VerificationError": 10,
    "StorageError": 11,
    "OutOfMemoryError": 12,
    "DivergedError": 13,
    "HungError": 14,
    "InputLostError": 15,
    "WorkerLostError": 16,
    "InterruptedByUserError": 130,
    "LeftError": 130,
}
FAULTS = [Fault("training.lr", "is too large", 2.0), Fault("training.train_csv", "is missing")]


def subclasses(kind: type[WhisperJobsError]) -> set[type[WhisperJobsError]]:
    below = set(kind.__subclasses__())
    return below.union(*map(subclasses, below))


def test_exit_codes_are_those_of_the_table() -> None:
    ours = {kind for kind in subclasses(WhisperJobsError) if kind.__module__ == errors.__name__}
    assert {kind.__name__: kind.exit_code for kind in ours} == CODES
    for name, code in CODES.items():
        if name not in ("SpecError", "ManifestError", "ExistsError"):
            line = next(line for line in str(errors.__doc__).splitlines() if name in line)
            assert f" {code} " in line


@pytest.mark.parametrize("name", CODES)
def test_errors_survive_pickling(name: str) -> None:
    kind = getattr(errors, name)
    for error in [kind("it went wrong")] + ([kind(FAULTS), kind([])] if issubclass(kind, InputError) else []):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.exit_code == error.exit_code
        assert getattr(again, "faults", None) == getattr(error, "faults", None)


def test_errors_survive_rays_own_pickling() -> None:
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    error = cloudpickle.loads(cloudpickle.dumps(ManifestError(FAULTS)))
    assert error.faults == FAULTS
    assert [fault.has_value for fault in error.faults] == [True, False]


def test_all_faults_stand_in_the_message_one_a_line() -> None:
    assert str(SpecError(FAULTS)) == "training.lr: 2.0 is too large\ntraining.train_csv: is missing"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "null"), (False, "false"), ("ñ", '"ñ"'), ([1], "[1]"), ({1}, '"{1}"'), ("x" * 100, '"' + "x" * 76 + "...")],
)
def test_a_faults_value_is_shown_as_json_and_cut_where_it_is_long(value: object, shown: str) -> None:
    assert str(Fault("here", "is wrong", value)) == f"here: {shown} is wrong"


def test_a_fault_as_json_has_a_value_only_where_there_is_one() -> None:
    assert [fault.as_dict() for fault in FAULTS] == [
        {"where": "training.lr", "message": "is too large", "value": 2.0},
        {"where": "training.train_csv", "message": "is missing"},
    ]
    assert Fault("here", "is null", None).as_dict()["value"] is None
