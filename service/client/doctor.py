"""All that a job needs, looked at in the order in which it fails."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from service.client.api import Api
from service.client.check import BAD_INPUT, Looked, as_fault, look, require_fitting_ray
from service.client.package import make_package
from service.errors import EXIT_DONE, InfeasibleError, InputError, WhisperJobsError
from service.requirements import DISTRIBUTION
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.spec.paths import is_uri
from service.storage import Storage


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        code: exit code of what is wrong; 0: nothing.
    """

    what: str
    text: str
    code: int = EXIT_DONE


def examine(opening: AbstractContextManager[Api], spec: JobSpec | None) -> Iterator[Finding]:
    """Look at everything, as far as one thing lets the next be seen.

    Args:
        opening: opens the cluster.
        spec: a job that is to run there; None: none in particular.
    """
    yield Finding(
        "client", f"whisper-jobs {importlib.metadata.version(DISTRIBUTION)}, Python {platform.python_version()}"
    )
    try:
        with opening as api:
            yield from _cluster(api)
            looked = look(api, make_package(spec.to_json() if spec else None), with_spec=spec is not None)
            yield from _nodes(looked)
            yield from _faults(looked, spec is not None)
    except WhisperJobsError as error:
        yield Finding("cluster", str(error), error.exit_code)
    if spec and is_uri(spec.root):
        try:
            Storage(spec.root).require_access(write=True)
            yield Finding("storage", f"{spec.root} can be read and written from here")
        except InputError as error:
            yield Finding("storage", f"from here: {error}", error.exit_code)


def _cluster(api: Api) -> Iterator[Finding]:
    cluster = api.cluster
    version = api.version()["ray_version"]
    require_fitting_ray(version)
    yield Finding("cluster", f"Ray {version} answers at {cluster.url}")
    yield Finding(
        "token", f"accepted, from {cluster.token_from}" if cluster.token else "none is set, and none is asked for"
    )


def _nodes(looked: Looked) -> Iterator[Finding]:
    if looked.packages:
        packages = ", ".join(f"{name} {version}" for name, version in looked.packages.items())
        yield Finding("packages", f"Python {looked.python}, {packages}")
    if looked.nodes:
        cpus, gpus = (sum(node[kind] for node in looked.nodes) for kind in ("cpus", "gpus"))
        room = f"{counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}"
        kind = f" ({looked.gpu})" if looked.gpu else ""
        grows = ", and an autoscaler that may add some" if looked.can_grow else ""
        yield Finding("nodes", f"{counted(len(looked.nodes), 'node')} with {room}{kind} in all{grows}")


def _faults(looked: Looked, with_spec: bool) -> Iterator[Finding]:
    for found in looked.faults:
        code = InputError.exit_code if found["kind"] in BAD_INPUT else InfeasibleError.exit_code
        yield Finding(found["kind"], str(as_fault(found, uploads=False)), code)
    for note in looked.notes:
        yield Finding(note["kind"], f"{note['where']}: {note['message']}")
    if with_spec and not looked.faults:
        yield Finding("job", "nothing keeps it from running there")
