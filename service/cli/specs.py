"""`validate`, `explain`, `schema`: commands about specs."""

from __future__ import annotations

import json
from typing import Any

import click

from service.cli.options import SpecCommand, SpecInput, output_options, spec_options
from service.cli.output import print_json, warn
from service.errors import Fault, SpecError
from service.spec.settings import Setting, find, sections, settings, suggest, suggest_section


@click.command(cls=SpecCommand)
@click.argument("spec", required=False)
@spec_options
@output_options
def validate(spec_input: SpecInput, output: str) -> int:
    """Check a job spec, without a cluster, and report every fault at once."""
    loaded = spec_input.load()
    spec = loaded.spec
    warn(loaded.warnings)
    if output == "json":
        facts = {"valid": True, "kind": spec.kind, "job_id": spec.job_id, "sha256": spec.sha256, "root": spec.root}
        print_json(facts | {"warnings": loaded.warnings})
    else:
        click.echo(f"{spec_input.source or 'the flags'}: a valid {spec.kind} job")
        click.echo(f"  job   {spec.job_id}\n  root  {spec.root}")
    return 0


@click.command(context_settings={"ignore_unknown_options": True})  # a setting may be given as its flag
@click.argument("setting", required=False)
@output_options
def explain(setting: str | None, output: str) -> int:
    """Tell what a setting is: meaning, type, range, default, flag. Without one, list them all."""
    if setting is None or setting in sections():
        chosen = [entry for entry in settings().values() if setting in (None, entry.section)]
        if output == "json":
            print_json([_facts(entry) for entry in chosen])
        else:
            click.echo(_listing(chosen))
        return 0
    found = find(setting)
    if not found:
        name = setting.rsplit(".", 1)[-1]
        close = suggest(name)
        begin = f"{name.replace('-', '_')}_"
        family = [path for path, known in settings().items() if known.name.startswith(begin)]
        if len(family) > 1:
            raise SpecError([Fault(setting, f"is no setting; those that begin so are {', '.join(family)}")])
        meant = suggest_section(setting, close) or (close[0].path if close else "")
        way_out = f"did you mean {meant}?" if meant else "`whisper-jobs explain` lists all"
        raise SpecError([Fault(setting, f"is no setting; {way_out}")])
    if output == "json":
        print_json(_facts(found[0]) if len(found) == 1 else [_facts(entry) for entry in found])
    else:
        click.echo("\n\n".join(map(_explanation, found)))
    return 0


@click.command()
@output_options
def schema(output: str) -> int:
    """Print the JSON schema of a job spec, for editors and other tools. It is JSON in any case."""
    from service.docs import json_schema

    print_json(json_schema())
    return 0


def _facts(setting: Setting) -> dict[str, Any]:
    return {
        "setting": setting.path,
        "description": " ".join(setting.doc.split()),
        "type": setting.type_text,
        "range": setting.range_text,
        "default": setting.default,
        "flag": setting.flag,
        "example": setting.example,
    }


def _listing(chosen: list[Setting]) -> str:
    lines: list[str] = []
    section = None
    for entry in chosen:
        if entry.section != section:
            section = entry.section
            lines += ["", f"{section}:" if section else ""] if lines else [f"{section}:" if section else "top level:"]
        lines.append(f"  {entry.name:<24} {entry.summary}")
    return "\n".join(lines)


def _explanation(setting: Setting) -> str:
    limits = f", {setting.range_text}" if setting.range_text else ""
    value = json.dumps(setting.example, ensure_ascii=False)
    flag = setting.flag or f"--set {setting.path}=..."
    if setting.is_switch:
        flag = f"{flag} / --no-{flag.removeprefix('--')}" if setting.flag else flag
    example = (
        f"{setting.section}:\n              {setting.name}: {value}" if setting.section else f"{setting.name}: {value}"
    )
    text = click.wrap_text(" ".join(setting.doc.split()), 100, "  ", "  ")
    return (
        f"{setting.path}\n{text}\n\n"
        f"  type      {setting.type_text}{limits}\n"
        f"  default   {json.dumps(setting.default, ensure_ascii=False)}\n"
        f"  flag      {flag}\n"
        f"  example   {example}"
    )
