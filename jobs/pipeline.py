"""A job from spec to manifest.json. Ray runs the parts that are heavy; what they do knows nothing of it."""

from __future__ import annotations

from typing import Any

import ray

from jobs.cluster.connection import connected
from jobs.cluster.errors import as_user_error
from jobs.cluster.events import Events
from jobs.cluster.resources import Resources
from jobs.cluster.waiting import require_resources
from jobs.inputs import require_same_inputs
from jobs.job import Job
from jobs.kinds.evaluate import evaluate_job
from jobs.kinds.export import export_job
from jobs.kinds.search import search_job
from jobs.kinds.train import train_job
from jobs.lock import sole_run
from jobs.progress import Reporter, transfer_events
from jobs.recorder import Recorder
from jobs.stages import Stages, claim_root, holds_run_of
from jobs.stopping import StopSignals
from service import artifacts
from service.errors import JobFailedError
from service.spec.job import JobSpec
from service.storage import Storage

KINDS = {"train": train_job, "search": search_job, "evaluate": evaluate_job, "export": export_job}


def run_job(spec: JobSpec, *, overwrite: bool, reporter: Reporter) -> dict[str, Any]:
    """Do a job, or go on with it; a finished one is only read.

    Args:
        spec: the job, resolved and checked.
        overwrite: delete what an earlier run left under the root.
        reporter: shows progress.

    Returns:
        the content of metrics.json.

    Raises:
        WhisperJobsError: with the exit code of what went wrong.
    """
    root = Storage(spec.root, transfer_events(reporter.show))
    signals = StopSignals()
    signals.install()
    root.require_access(write=True)
    if not overwrite and is_complete(spec, root):
        reporter.show({"event": "notice", "text": f"this job is complete already: {root.path()}"})
        return dict(root.read_json(artifacts.METRICS))

    def tell(text: str) -> None:
        reporter.show({"event": "notice", "text": text})

    with sole_run(root, tell) as still_held:
        signals.watch(still_held)
        claim_root(spec, root, overwrite=overwrite)
        require_same_inputs(spec, root)
        with Recorder(root, reporter) as recorder:
            return _run(spec, root, recorder, reporter, signals)


def is_complete(spec: JobSpec, root: Storage) -> bool:
    """Whether a run of this very job, on these very inputs, has ended here. Such a run is only read.

    Raises:
        InputError: it has, and its inputs have changed since.
    """
    if not root.exists(artifacts.MANIFEST) or not holds_run_of(spec, root):
        return False
    require_same_inputs(spec, root)
    return True


def _run(spec: JobSpec, root: Storage, recorder: Recorder, reporter: Reporter, signals: StopSignals) -> dict[str, Any]:
    if _is_temporary(root):
        text = "results go to a folder that Ray deletes with the job's working directory; give an absolute path or URI"
        recorder.take({"event": "notice", "level": "warning", "text": f"{text} as outdir or storage.uri"})
    reporter.show({"event": "root", "job_id": spec.job_id, "root": root.path()})
    with connected(signals) as local:
        events = Events(recorder.take)

        def tell(text: str) -> None:
            events.emit({"event": "notice", "text": text})

        def await_resources() -> Resources:
            return require_resources(spec, local=local, tell=tell, check=signals.check)

        try:
            resources = await_resources()
            stages = Stages(root, events.emit)
            asked = with_gpus(spec, resources)
            job = Job(asked, root, events, resources, signals, await_resources, stages, recorder)
            return KINDS[spec.kind](job)
        except ray.exceptions.RayError as error:
            raise as_user_error(error) from error
        except JobFailedError as error:
            events.flush()
            for text in recorder.tracebacks:
                error.add_note(text)  # shown with --debug
            raise
        finally:
            events.close()
            reporter.close()


def with_gpus(spec: JobSpec, resources: Resources) -> JobSpec:
    """The spec with the GPUs that its workers really get, which `null` leaves to the cluster."""
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"gpus_per_worker": resources.gpus})})


def _is_temporary(root: Storage) -> bool:
    """Whether the root lies in the copy of a working directory that `ray job submit --working-dir` made."""
    return root.is_local and "/runtime_resources/working_dir_files/" in root.path()
