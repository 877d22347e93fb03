"""What runs on the cluster: `python -m jobs.main --config SPEC [flags]` or `python -m jobs.main manifest ...`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

from jobs.local_ray import give_token
from service.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    Fault,
    InputError,
    InterruptedByUserError,
    RefusedError,
    WhisperJobsError,
    failure_text,
)
from service.spec import flags
from service.spec.load import load_spec
from service.writing import drop_output


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    manifest = words[:1] == ["manifest"]
    options = _manifest_parser().parse_args(words[1:]) if manifest else _job_parser().parse_args(words)
    try:
        return _manifest(options) if manifest else _run(options)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the outermost edge
        if options.debug:
            traceback.print_exc()
        return _show_failure(error, as_json=options.output == "json", goes_on=not manifest)


def _run(options: argparse.Namespace) -> int:
    loaded = load_spec(Path(options.config) if options.config else None, flags.overrides_from(options))
    if not options.no_warnings:
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    give_token()
    from jobs.pipeline import run_job
    from jobs.progress import Reporter
    from jobs.publish import refused_artifacts
    from service.storage import Storage

    # What the libraries print of their own accord is no result; Ray's words on a worker's death come here too.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stderr if options.debug else nowhere):
        metrics = run_job(loaded.spec, overwrite=options.overwrite, reporter=Reporter())
    if options.output == "json":
        print(json.dumps(metrics | {"root": loaded.spec.root}, indent=2, ensure_ascii=False))
    else:
        from jobs.summary import print_summary

        print_summary(Storage(loaded.spec.root), metrics)
    if refused := refused_artifacts(metrics):
        raise RefusedError(
            f"{len(refused)} of the exports did not pass: {', '.join(refused)}. {Storage(loaded.spec.root).path()} "
            "holds everything; metrics.json and the REFUSED.txt of each say why. `whisper-jobs export` makes them anew"
        )
    return EXIT_DONE


def _manifest(options: argparse.Namespace) -> int:
    from jobs.manifest.command import run

    return run(options)


def _job_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.main", description="Run a job spec on this Ray cluster.", allow_abbrev=False
    )
    flags.add_to(parser)
    parser.add_argument("--overwrite", action="store_true", help="Delete what an earlier run left under the same root.")
    _add_common(parser)
    return parser


def _manifest_parser() -> argparse.ArgumentParser:
    from jobs.manifest.command import add_parsers

    parser = argparse.ArgumentParser(prog="whisper-jobs manifest", description="Manifests.", allow_abbrev=False)
    add_parsers(parser, _add_common)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="Form of the result on stdout."
    )
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")


def _show_failure(error: BaseException, *, as_json: bool, goes_on: bool) -> int:
    """Print an error for its reader; returns the exit code."""
    faults: list[Fault] = []
    if isinstance(error, KeyboardInterrupt):
        error = InterruptedByUserError("interrupted")
    elif isinstance(error, OSError | MemoryError):
        from jobs.failures import explain, explain_alone

        drop_output(error)
        error = explain(error) if goes_on else explain_alone(error)
    if isinstance(error, WhisperJobsError):
        message, code = str(error), error.exit_code
        faults = error.faults if isinstance(error, InputError) else []
    else:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        message = f"{reason}; this is a fault of whisper-jobs: run again with --debug for the traceback"
        code = EXIT_INTERNAL
    print(failure_text(message, faults, code, as_json=as_json), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
