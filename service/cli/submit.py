"""`submit` and `resume`: a spec to a cluster, once, and then its log or its outcome."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.artifacts import METRICS, SPEC
from service.cli.cluster import (
    address_option,
    address_word,
    come_back,
    complete_job,
    find_job,
    job_rows,
    keep_address,
    opened,
    print_rows,
)
from service.cli.following import follow_on_screen, wait_quietly
from service.cli.options import SpecCommand, SpecInput, output_options, spec_options, with_options
from service.cli.output import print_json, print_plan, spec_as_yaml, warn
from service.cli.uploads import planned_uploads, send_uploads
from service.errors import EXIT_DONE, Fault, InputError, NotFoundError, SpecError, StorageError
from service.requirements import DISTRIBUTION
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.spec.load import LoadedSpec
from service.spec.paths import is_uri

if TYPE_CHECKING:
    from service.client.api import Api
    from service.client.progress import Progress
    from service.client.record import JobRecord
    from service.client.submit import Submission
    from service.upload import UploadPlan


FOLLOW, WAIT, DETACH = "follow", "wait", "detach"


def _watching(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--reuse-name`, and one of `--follow`, `--wait` and `--detach` as `mode`."""

    @wraps(function)
    def with_mode(**values: Any) -> Any:
        asked = [mode for mode in (FOLLOW, WAIT, DETACH) if values.pop(mode)]
        if len(asked) > 1:
            raise click.UsageError(f"--{asked[0]} and --{asked[1]} exclude each other; give one of them")
        return function(mode=asked[0] if asked else FOLLOW, **values)

    options = with_options(
        click.option("--reuse-name", is_flag=True, help="Take a name that another job with another spec has."),
        click.option("--follow", FOLLOW, is_flag=True, help="Show the log until the job's end (the default)."),
        click.option("--wait", WAIT, is_flag=True, help="Wait for the job's end, without its log."),
        click.option("--detach", DETACH, is_flag=True, help="End once the job is submitted."),
    )
    decorated: Callable[..., Any] = options(with_mode)
    return decorated


@click.command(cls=SpecCommand)
@click.argument("spec", required=False)
@spec_options
@click.option(
    "--dry-run", is_flag=True, help="Print the spec, the plan, what would be uploaded and what it would take."
)
@click.option(
    "--upload", is_flag=True, help="Bring the CSVs, audio and models that the spec names here to its storage."
)
@click.option("--gpu", metavar="NAME", help="Kind of GPU for the estimate of --dry-run: H100, A10G, ...")
@click.option("--prices", type=Path, metavar="FILE", help="For --dry-run: prices, YAML as {gpu_hour: {H100: 2.99}}.")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier run left under the same root.")
@_watching
@address_word
@output_options
def submit(
    spec_input: SpecInput,
    dry_run: bool,
    upload: bool,
    gpu: str | None,
    prices: Path | None,
    overwrite: bool,
    mode: str,
    reuse_name: bool,
    address: str | None,
    output: str,
) -> int:
    """Submit a job to a Ray cluster, and follow it. The same command again attaches to it, or goes on with it.

    Paths in SPEC are paths on the cluster; with --upload they are paths here, and what they name is brought along.
    """
    loaded = spec_input.load(check_files=upload)
    warn(loaded.warnings)
    if dry_run:
        return _show_plan(loaded, upload=upload, gpu=gpu, prices=prices, output=output)
    keep_address(address)
    with opened(address) as api:
        require_cluster(api)
        from service.upload import spec_there

        bring = planned_uploads(loaded.spec) if upload else None
        spec = spec_there(bring) if bring else loaded.spec
        return run_there(api, spec, bring=bring, overwrite=overwrite, mode=mode, reuse_name=reuse_name, output=output)


@click.command()
@click.argument("job", shell_complete=complete_job)
@_watching
@address_option
@output_options
def resume(api: Api, job: str, mode: str, reuse_name: bool, output: str) -> int:
    """Go on with a job that has failed, was stopped or was lost with its cluster, from what its storage holds.

    JOB is a job of this cluster, or the root of a run (a URI, or a folder with a / in its name), which needs no cluster
    that remembers it.
    """
    from service.client.submit import spec_of

    require_cluster(api)
    if is_uri(job) or "/" in job:
        if not is_uri(job) and not Path(job).expanduser().is_dir():
            text = "is no folder on this machine; give the job's id or, where the root is the cluster's alone, its spec"
            raise InputError([Fault("JOB", f"{text} to `whisper-jobs submit`", job)])
        spec = _spec_at(job)
    else:
        record = find_job(api, job)
        found = spec_of(record)
        if found is None:
            text = "was not submitted by this version of whisper-jobs, and so its spec is not known; give its root"
            raise InputError([Fault(record.submission_id, text + _hint(record))])
        spec = found
    return run_there(api, spec, bring=None, overwrite=False, mode=mode, reuse_name=reuse_name, output=output)


def require_cluster(api: Api) -> None:
    """Find out at once whether a cluster answers, takes the token and has a Ray that fits."""
    from service.client.check import require_fitting_ray

    require_fitting_ray(api.version()["ray_version"])


def run_there(
    api: Api, spec: JobSpec, *, bring: UploadPlan | None, overwrite: bool, mode: str, reuse_name: bool, output: str
) -> int:
    """Submit a job, or attach to it, and watch it as asked; returns the exit code.

    Args:
        api: the cluster.
        spec: the job, with what is to be uploaded where it will be.
        bring: what is to be uploaded once the cluster is known to fit.
        overwrite: delete what an earlier run has left.
        mode: FOLLOW, WAIT or DETACH.
        reuse_name: take a name that another job has.
        output: form of the result.
    """
    from service.client.check import look, require_fit
    from service.client.package import make_package
    from service.client.submit import submit as submit_job

    package = make_package(spec.to_json())

    def check() -> None:
        click.echo(f"checking on {api.cluster.url}: versions, resources, storage, files", err=True)
        looked = look(api, package, with_spec=True, brought=[item.setting for item in bring.items] if bring else [])
        warn(f"{note['where']}: {note['message']}" for note in looked.notes)
        require_fit(looked, uploads=bring is not None)
        if bring:
            send_uploads(bring)

    submission = submit_job(
        api,
        spec,
        package,
        version=importlib.metadata.version(DISTRIBUTION),
        overwrite=overwrite,
        reuse_name=reuse_name,
        check=check,
    )
    if submission.ended:
        click.echo(f"{submission.submission_id}  {_how(api, submission)}", err=True)
        return _show_outcome(spec, submission, submission.ended, None, output)
    if mode == DETACH:
        return _show_submission(api, spec, submission, output)
    click.echo(f"{submission.submission_id}  {_how(api, submission)}", err=True)
    progress: Progress | None = None
    if mode == FOLLOW:
        record, progress = follow_on_screen(api, submission.submission_id)
    else:
        record = wait_quietly(api, submission.submission_id)
    return _show_outcome(spec, submission, record, progress, output)


def _how(api: Api, submission: Submission) -> str:
    if submission.attached:
        how = "has been done, with this very spec" if submission.ended else "is at work, with this very spec: attached"
        return f"{how} ({api.cluster.url})"
    return f"submitted to {api.cluster.url}{', to go on where the try before has ended' if submission.again else ''}"


def _show_submission(api: Api, spec: JobSpec, submission: Submission, output: str) -> int:
    job_id = submission.submission_id
    if output == "json":
        facts = {name: getattr(submission, name) for name in ("submission_id", "attached", "again")}
        print_json(facts | {"job_id": spec.job_id, "root": spec.root, "address": api.cluster.url})
    else:
        rows = [("root", spec.root), ("follow", come_back("logs -f", job_id)), ("stop", come_back("stop", job_id))]
        print_rows(f"{job_id}  {_how(api, submission)}", rows)
    return EXIT_DONE


def _show_outcome(
    spec: JobSpec, submission: Submission, record: JobRecord, progress: Progress | None, output: str
) -> int:
    if output == "json":
        facts = record.as_dict() | {"attached": submission.attached, "metrics": _metrics(spec)}
        print_json(facts)
        return record.exit_code
    rows = job_rows(record, progress)
    if record.exit_code == EXIT_DONE:
        rows.append(("pull", f"whisper-jobs pull {spec.root} DIR"))
    elif record.exit_code != InputError.exit_code:
        rows.append(("go on", come_back("resume", record.submission_id)))
    print_rows(f"\n{record.submission_id}  {record.outcome}", [row for row in rows if row[0] != "state"])
    return record.exit_code


def _metrics(spec: JobSpec) -> dict[str, Any] | None:
    """metrics.json of a finished run, where this machine can read it."""
    from service.storage import Storage

    try:
        return dict(Storage(spec.root, patience_s=5).read_json(METRICS))
    except (NotFoundError, StorageError, InputError):
        return None


def _spec_at(root: str) -> JobSpec:
    """The spec of a run, from its root."""
    from service.storage import Storage

    storage = Storage(root)
    storage.require_access()
    try:
        spec = JobSpec.model_validate_json(storage.read_bytes(SPEC))
    except NotFoundError:
        raise NotFoundError(f"{root}: is no root of a run (there is no {SPEC})") from None
    except ValueError:
        raise SpecError([Fault(storage.path(SPEC), "cannot be read by this version of whisper-jobs")]) from None
    # A run may have been moved, or be seen under another name from here.
    return spec if spec.root == storage.path() else _at(spec, storage.path())


def _at(spec: JobSpec, root: str) -> JobSpec:
    return spec.model_copy(update={"training": spec.training.model_copy(update={"outdir": root})})


def _hint(record: JobRecord) -> str:
    return f" ({record.root})" if record.root else ", or its spec to `whisper-jobs submit`"


def _show_plan(loaded: LoadedSpec, *, upload: bool, gpu: str | None, prices: Path | None, output: str) -> int:
    from service.estimate import UTILISATION, estimate, read_prices
    from service.plan import make_plan
    from service.spec.whisper_dims import known_dims

    spec = loaded.spec
    plan = make_plan(spec)
    expected = estimate(spec, plan, known_dims(spec.training.base_model), gpu, read_prices(prices) if prices else None)
    uploads = planned_uploads(spec, look=False) if upload else None
    if output == "json":
        facts: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "plan": plan.as_dict()}
        facts["warnings"] = loaded.warnings
        facts["uploads"] = uploads.as_dict() if uploads else None
        facts["workers"] = spec.resources.model_dump(mode="json")
        print_json(facts | {"estimate": expected.as_dict() if expected else None})
        return EXIT_DONE
    click.echo(spec_as_yaml(spec))
    print_plan(plan)
    asked = spec.resources
    gpus = (
        "1 GPU each if the cluster has any"
        if asked.gpus_per_worker is None
        else f"{counted(asked.gpus_per_worker, 'GPU')} each"
    )
    rows = [("workers", f"{asked.workers}, {gpus}, {counted(asked.cpus_per_worker, 'CPU')} each")]
    if expected:
        cost = "" if expected.cost is None else f", {expected.cost:,.2f} {expected.currency}"
        rough = f"{UTILISATION:.0%} of the peak of {expected.gpu}, which is a guess: half or twice as much is possible"
        clock = f"{_about(expected.hours)} h by the clock"
        if plan.search:
            clock = f"at most, were no trial ended early; {clock} with one trial at a time"
        rows += [("GPU-hours", f"{_about(expected.gpu_hours)}{cost}; {clock} ({rough})")]
    else:
        rows += [
            ("GPU-hours", "not known here: no GPUs, rows that cannot be counted here, or a model that is not known")
        ]
    rows += [("uploads", uploads.words())] if uploads else []
    print_rows("", rows)
    return EXIT_DONE


def _about(hours: float) -> str:
    return "under 0.1" if hours < 0.1 else f"about {hours:.1f}" if hours < 10 else f"about {hours:,.0f}"
