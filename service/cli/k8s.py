"""`k8s render` and `k8s check`: manifests for Kubernetes, without one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from service.cli.options import SpecCommand, SpecInput, output_options, spec_options, with_options
from service.cli.output import print_json, warn
from service.cli.uploads import planned_uploads, send_uploads
from service.errors import EXIT_DONE, Fault, InputError
from service.spec.counted import counted
from service.spec.look import is_file


@click.group()
def k8s() -> None:
    """Manifests for Kubernetes with KubeRay; no cluster is asked."""


_manifest_options = with_options(
    click.option("--image", required=True, metavar="IMAGE", help="The image of docker/, in your registry."),
    click.option("--namespace", default="whisper-jobs", show_default=True, help="Where k8s/base is."),
    click.option("--schedule", metavar="CRON", help='A CronJob in place of a RayJob: "0 2 * * *".'),
    click.option("--time-zone", metavar="ZONE", help="Of the schedule. Default: Etc/UTC."),
    click.option("--suspend", is_flag=True, help="Have the schedule rest at first."),
    click.option("--cluster", metavar="NAME", help="The RayCluster that runs a scheduled job. Default: whisper-jobs."),
    click.option("--queue", metavar="NAME", help="LocalQueue of Kueue that the RayJob waits in."),
    click.option("--memory", metavar="24Gi", help="Of each worker pod. Default: by the base model's size."),
    click.option("--spot", is_flag=True, help="Workers on spot nodes; the head never is on one."),
    click.option("--node-selector", multiple=True, metavar="KEY=VALUE", help="Of the workers' nodes."),
    click.option("--mount", multiple=True, metavar="CLAIM:/path", help="A volume that all pods share."),
    click.option("--pull-secret", metavar="NAME", help="Secret with which the image is pulled."),
    click.option("--upload", is_flag=True, help="Bring what the spec names on this machine to its storage."),
)


@k8s.command(cls=SpecCommand)
@click.argument("spec", required=False)
@spec_options
@_manifest_options
@output_options
def render(spec_input: SpecInput, node_selector: Sequence[str], mount: Sequence[str], **more: Any) -> int:
    """Print the manifests of a job, for `kubectl apply -f -`: a RayJob with a cluster of its own.

    With --schedule it is a CronJob that submits the job to a RayCluster that is there (k8s/base), each time anew.
    Paths in SPEC are paths in the pods; with --upload they are paths here, and what they name is brought along.
    """
    from service.kubernetes import RenderOptions
    from service.kubernetes import render as render_manifests

    upload, output = more.pop("upload"), more.pop("output")
    options = RenderOptions(node_selector=tuple(node_selector), mounts=_mounts(mount), **more)
    loaded = spec_input.load(check_files=upload)
    job = loaded.spec
    bring = None
    if upload:
        from service.upload import spec_there

        bring = planned_uploads(job)
        job = spec_there(bring)
    rendered = render_manifests(job, options)  # before anything is sent: it may be refused
    warn(loaded.warnings)
    for note in rendered.notes:
        click.echo(f"note: {note}", err=True)
    if bring:
        send_uploads(bring)
    if output == "json":
        print_json({"apiVersion": "v1", "kind": "List", "items": rendered.manifests})
    else:
        click.echo(rendered.to_yaml(), nl=False)
    return EXIT_DONE


@k8s.command()
@click.argument("file")
@output_options
def check(file: str, output: str) -> int:
    """Check manifests (a file, or - for what `kubectl kustomize` prints) against what no schema says.

    These are the rules of KubeRay's operator, which takes such an object and then does nothing with it, those of Kueue
    and of the restricted pod security standard, and ours: requests and limits, probes, time to save a checkpoint, no
    secret written out.
    """
    from service.kubernetes import check as check_manifests
    from service.kubernetes import unknown_kinds

    manifests = _read(file)
    faults = check_manifests(manifests)
    if output == "json":
        print_json({"objects": len(manifests), "faults": [fault.as_dict() for fault in faults]})
    elif faults:
        click.echo("\n".join(map(str, faults)))
    else:
        click.echo(f"{file}: {counted(len(manifests), 'object')}, nothing to object to")
    if unknown := unknown_kinds(manifests):
        click.echo(f"note: nothing is known here of {', '.join(unknown)}", err=True)
    return InputError.exit_code if faults else EXIT_DONE


def _read(file: str) -> list[dict[str, Any]]:
    """The objects of a stream of YAML, those of lists among them.

    Raises:
        InputError: it is none.
    """
    import yaml

    if file != "-" and not is_file(file):
        raise InputError([Fault("FILE", "is no file; give manifests, or - for the standard input", file)])
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError([Fault("FILE", f"is no YAML: {' '.join(str(error).split())}", file)]) from None
    objects: list[dict[str, Any]] = []
    for document in documents:
        found = document.get("items") if isinstance(document, dict) and document.get("kind") == "List" else [document]
        objects += found or []
    foreign = [number for number, one in enumerate(objects, 1) if not (isinstance(one, dict) and "kind" in one)]
    if len(foreign) == len(objects):
        raise InputError([Fault("FILE", "holds no objects of Kubernetes", file)])
    if foreign:
        which = f"{'s' * (len(foreign) > 1)} {', '.join(map(str, foreign))} of {len(objects)}"
        raise InputError(
            [Fault("FILE", f"holds what is no object of Kubernetes: it has no kind (number{which})", file)]
        )
    return objects


def _mounts(words: Sequence[str]) -> tuple[Any, ...]:
    from service.kubernetes import Mount

    return tuple(Mount(claim, path) for claim, _, path in (word.partition(":") for word in words))
