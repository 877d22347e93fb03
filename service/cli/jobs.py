"""`run`, `evaluate` and `export`: a job on this machine, through the same program that a cluster runs."""

from __future__ import annotations

from pathlib import Path

import click

from service.artifacts import SPEC
from service.cli.options import SpecCommand, SpecInput, is_debug, output_options, spec_options, untrained_spec_options
from service.cli.output import print_json, print_plan, spec_as_yaml, warn
from service.spec.export import HF
from service.spec.flags import Override
from service.spec.job import JobSpec
from service.spec.load import LoadedSpec


@click.command(cls=SpecCommand)
@click.argument("spec", required=False)
@spec_options
@click.option("--dry-run", is_flag=True, help="Print the resolved spec and the plan; start nothing.")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier run left under the same root.")
@output_options
def run(spec_input: SpecInput, dry_run: bool, overwrite: bool, output: str) -> int:
    """Run a job on this machine: a local Ray is started for it. The same command again goes on where it stopped.

    Relative paths, those in SPEC too, start at the current folder.
    """
    return _start(spec_input.load(), dry_run=dry_run, overwrite=overwrite, output=output)


@click.command(cls=SpecCommand)
@click.argument("model")
@click.argument("csv")
@untrained_spec_options
@click.option("--dry-run", is_flag=True, help="Print the resolved spec and the plan; start nothing.")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier evaluation left under the same root.")
@output_options
def evaluate(spec_input: SpecInput, model: str, csv: str, dry_run: bool, overwrite: bool, output: str) -> int:
    """Score MODEL on CSV: word and character error rates, with an interval.

    MODEL is a hub id, a folder with a checkpoint or a PEFT adapter, or the root of a run.
    """
    loaded = spec_input.load(
        Override("kind", "evaluate", "evaluate"),
        Override("evaluation.model", model, "MODEL"),
        Override("evaluation.csv", csv, "CSV"),
        unless_set=_language_of_run(model),
    )
    return _start(loaded, dry_run=dry_run, overwrite=overwrite, output=output)


@click.command(cls=SpecCommand)
@click.argument("source")
@click.option("--base", help="Base model of an adapter, where it is not the one that its configuration names.")
@click.option(
    "--formats", multiple=True, metavar="NAME ...", help="Formats, e.g. ggml-q8_0 ctranslate2-int8 openai. Default: hf."
)
@click.option("--csv", help="Held-out clips for the proof. Default: those that a run was scored on.")
@click.option("--out", help="Where the result goes: a folder or URI. Default: a folder under ./runs.")
@untrained_spec_options
@click.option("--dry-run", is_flag=True, help="Print the resolved spec and the plan; start nothing.")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier export left under the same root.")
@output_options
def export(
    spec_input: SpecInput,
    source: str,
    base: str | None,
    formats: tuple[str, ...],
    csv: str | None,
    out: str | None,
    dry_run: bool,
    overwrite: bool,
    output: str,
) -> int:
    """Merge SOURCE, export it, and prove every export in its own runtime.

    SOURCE is the root of a run, a PEFT adapter of whatever origin, or a checkpoint.
    """
    given = {
        "export.base": (base, "--base"),
        "export.formats": ([HF, *formats] if formats else None, "--formats"),
        "evaluation.csv": (csv, "--csv"),
        "training.outdir": (out, "--out"),
    }
    loaded = spec_input.load(
        Override("kind", "export", "export"),
        Override("export.source", source, "SOURCE"),
        *(Override(path, value, label) for path, (value, label) in given.items() if value is not None),
        unless_set=_language_of_run(source),
    )
    return _start(loaded, dry_run=dry_run, overwrite=overwrite, output=output)


def _language_of_run(model: str) -> list[Override]:
    """What a run took for rows that name no language, so that it is scored as it was trained; a flag still wins."""
    spec = Path(model).expanduser() / SPEC
    try:
        trained = JobSpec.model_validate_json(spec.read_bytes())
    except (OSError, ValueError):
        return []
    return [Override("training.language", trained.training.language, str(spec))]


def _start(loaded: LoadedSpec, *, dry_run: bool, overwrite: bool, output: str) -> int:
    if dry_run:
        return _show_plan(loaded, output)
    from service.local import run_locally

    warn(loaded.warnings)
    return run_locally(loaded.spec, overwrite=overwrite, output=output, debug=is_debug())


def _show_plan(loaded: LoadedSpec, output: str) -> int:
    from service.plan import make_plan

    plan = make_plan(loaded.spec)
    warn(loaded.warnings)
    if output == "json":
        print_json({"spec": loaded.spec.model_dump(mode="json"), "plan": plan.as_dict(), "warnings": loaded.warnings})
    else:
        click.echo(spec_as_yaml(loaded.spec))
        print_plan(plan)
    return 0
