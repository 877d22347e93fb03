"""Checks across settings, each a small function over the spec; those of files and modules have their own files."""

from __future__ import annotations

from collections.abc import Callable

from service.errors import Fault, SpecError
from service.spec.base import Spec
from service.spec.check_exports import export_findings, shape_findings
from service.spec.check_files import FILE_CHECKS
from service.spec.check_inits import init_findings
from service.spec.check_modules import module_findings, rank_findings
from service.spec.check_space import idle_findings, search_findings, space_findings
from service.spec.findings import Finding, Findings, advice
from service.spec.job import JobSpec
from service.spec.paths import MEMORY, MODELS, PATHS, is_stored, is_uri, unknown_uri
from service.spec.settings import FLAT, nearest
from service.spec.training import AUTO
from service.spec.whisper_dims import OPENAI, NotWhisperError, WhisperDims, dims_of, is_folder, known_dims
from service.spec.whisper_modules import modules

TRAINING = ("train", "search")
"""Kinds of jobs that fine-tune a model."""

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""accelerate's names."""

PROMPT_TOKENS = 4
"""Start, language, task and no-timestamps: what stands before a transcript."""


def findings(spec: JobSpec, *, check_files: bool = True) -> Findings:
    """Everything that is wrong with a spec whose settings are each valid, or that is probably not meant.

    Args:
        check_files: whether to look at the files that the spec names.
    """
    for check in CHECKS[spec.kind]:
        yield from check(spec)
    if check_files:
        for check in FILE_CHECKS[spec.kind]:
            yield from check(spec)
    if trains(spec):
        yield from _base_model(spec, check_files=check_files)
    if spec.kind == "search":
        dims = known_dims(spec.training.base_model)
        yield from space_findings(spec, lambda job: _at_a_point(job, dims))


def trains(spec: JobSpec) -> bool:
    """Whether the job fine-tunes a model."""
    return spec.kind in TRAINING


def _at_a_point(job: JobSpec, dims: WhisperDims | None) -> Findings:
    """The checks of a train job that settings of `training` decide."""
    yield from init_findings(job)
    yield from rank_findings(job.training) if dims is None else findings_on(job, dims)


def _required(spec: JobSpec) -> Findings:
    csvs = [
        ("training.train_csv", "give the CSV of the clips to train on"),
        ("training.val_csv", "give the CSV of the held-out clips"),
    ]
    wanted: dict[str, list[tuple[str, str]]] = {
        **dict.fromkeys(TRAINING, csvs),
        "evaluate": [
            ("evaluation.model", "give the model to score: a hub id, a folder or the root of a run"),
            ("evaluation.csv", "give the CSV to score it on"),
        ],
        "export": [("export.source", "give what to export: the root of a run, a PEFT adapter or a checkpoint")],
    }
    for path, way_out in wanted[spec.kind]:
        section, name = path.split(".")
        section_spec: Spec = getattr(spec, section)
        if trains(spec) and spec.data.dataset:
            if getattr(section_spec, name) is not None:
                text = "is given, and data.dataset too; give one of the two"
                yield Finding((path, "data.dataset"), text, getattr(section_spec, name))
        elif getattr(section_spec, name) is None:
            yield Finding((path, "kind"), f"is missing; {way_out}")


def _precision(spec: JobSpec) -> Findings:
    training, gpus = spec.training, spec.resources.gpus_per_worker
    if training.fp16 and training.bf16:
        yield Finding(("training.fp16", "training.bf16"), "and bf16 exclude each other; switch one of them off")
    if training.fp16 and gpus == 0:
        yield Finding(
            ("training.fp16", "resources.gpus_per_worker"),
            "needs a GPU, and resources.gpus_per_worker is 0; switch fp16 off or give each worker a GPU",
        )
    if spec.engine.attention != "flash_attention_2":
        return
    if gpus == 0:
        yield Finding(
            ("engine.attention", "resources.gpus_per_worker"),
            "needs a GPU, and resources.gpus_per_worker is 0; take sdpa",
            spec.engine.attention,
        )
    elif not training.fp16 and training.bf16 is False:
        yield Finding(
            ("engine.attention", "training.bf16", "training.fp16"),
            "works in half precision only; set training.bf16 or training.fp16 to true, or take sdpa",
            spec.engine.attention,
        )


def _offload(spec: JobSpec) -> Findings:
    training = spec.training
    runtime = training.lora_runtime_config
    if runtime is not None and training.dora_ephemeral_offload and not runtime.ephemeral_gpu_offload:
        yield Finding(
            ("training.dora_ephemeral_offload", "training.lora_runtime_config"),
            "is on, and lora_runtime_config says ephemeral_gpu_offload is off; keep one of the two",
        )
    elif training.ephemeral_gpu_offload:
        name = "dora_ephemeral_offload" if training.dora_ephemeral_offload else "lora_runtime_config"
        if not training.use_dora:
            yield advice(f"training.{name}", "has no effect without use_dora")
        elif spec.resources.gpus_per_worker == 0:
            yield advice(f"training.{name}", "has no effect without a GPU, and resources.gpus_per_worker is 0")


def _resources(spec: JobSpec) -> Findings:
    gpus, workers, fewest = spec.resources.gpus_per_worker, spec.resources.workers, spec.resources.min_workers
    if fewest is not None and fewest > workers:
        yield Finding(
            ("resources.min_workers", "resources.workers"),
            f"is more than resources.workers ({workers}); give {workers} or less, or leave it out"
            if workers
            else "has no effect with resources.workers 0, which trains in the job's own process; leave it out",
            fewest,
        )
    if gpus is None or gpus == 0:
        return
    if gpus > 1 and not gpus.is_integer():
        yield Finding(
            ("resources.gpus_per_worker",), "is no share that Ray gives: below 1, or a whole number of GPUs", gpus
        )
    elif gpus > 1:
        yield advice("resources.gpus_per_worker", "a worker trains on one GPU; raise resources.workers instead", gpus)
    elif gpus < 1 and workers > 1:
        yield Finding(
            ("resources.gpus_per_worker", "resources.workers"),
            f"lets {workers} workers share a GPU, which NCCL refuses; give 1, or one worker",
            gpus,
        )


def _dataset(spec: JobSpec) -> Findings:
    if spec.data.dataset is not None:
        return
    for name in ("dataset_config", "text_column", "group", "val_ratio"):
        value = getattr(spec.data, name)
        if value != type(spec.data).model_fields[name].default:
            yield advice(f"data.{name}", "has no effect without data.dataset", value)


def _packing(spec: JobSpec) -> Findings:
    data = spec.data
    if data.packing and spec.training.pass_sizes == [1]:
        text = (
            "joins nothing: training.per_dev_batch, which counts utterances, is 1, and no window goes beyond a forward "
            "pass; raise it, and lower training.grad_accum in turn, or switch data.packing off"
        )
        if spec.training.per_dev_batch == AUTO:
            text = (
                "joins nothing: training.per_dev_batch is auto and training.grad_accum, the utterances of a step, is "
                "1; raise training.grad_accum, or switch data.packing off"
            )
        yield Finding(("data.packing", "training.per_dev_batch", "training.grad_accum"), text, data.packing)
    for name in ("packing_single", "packing_gap_s"):
        value = getattr(data, name)
        if not data.packing and value != type(data).model_fields[name].default:
            yield advice(f"data.{name}", "has no effect without data.packing", value)


def _idle_training(spec: JobSpec) -> Findings:
    if spec.idle:
        first, *others = spec.idle
        more = f", nor {'has' if len(others) == 1 else 'have'} {', '.join(others)}" if others else ""
        yield advice(f"{FLAT}.{first}", f"has no effect with kind {spec.kind}, which trains nothing{more}")


def _guard(spec: JobSpec) -> Findings:
    guard = spec.guard
    if not trains(spec) and guard.csv is not None:
        yield advice("guard.csv", f"has no effect with kind {spec.kind}: there is no tuned model to guard", guard.csv)
    for name in ("max_wer_increase", "max_regressions"):
        value = getattr(guard, name)
        if guard.csv is None and value != type(guard).model_fields[name].default:
            yield advice(f"guard.{name}", "has no effect without guard.csv", value)


def _limits(spec: JobSpec) -> Findings:
    for path, limit in {
        "guard.max_wer_increase": spec.guard.max_wer_increase,
        "export.max_wer_increase": spec.export.max_wer_increase,
    }.items():
        if limit > 0.2:
            points = f"{100 * limit:g} percentage points"
            yield advice(path, f"lets the WER rise by {points}, which stops next to nothing; 0.02 is two", limit)


def _trackers(spec: JobSpec) -> Findings:
    for name in spec.engine.report_to:
        if name.lower() not in (*TRACKERS, "none"):
            close = nearest(name, TRACKERS)
            way_out = f"did you mean {close[0]}?" if close else f"known are {', '.join(TRACKERS)}"
            yield Finding(("engine.report_to",), f"is no tracker that accelerate knows; {way_out}", name)


def _advice_on_training(spec: JobSpec) -> Findings:
    training = spec.training
    if training.warmup_ratio > 0.5:
        yield advice("training.warmup_ratio", "is most of the training; 0 to 0.2 are usual", training.warmup_ratio)
    if training.lr > 1e-2:
        yield advice("training.lr", "is far above what adapters bear; 5e-5 to 1e-3 are usual", training.lr)


def _base_model(spec: JobSpec, *, check_files: bool) -> Findings:
    """The checkpoint's name, and what can be checked once its dims are known."""
    name = spec.training.base_model
    if unknown_uri(name):
        return
    misnamed = list(_hub_name("training.base_model", name))
    yield from misnamed
    if any(finding.fatal for finding in misnamed):
        return
    try:
        dims = dims_of(name)
    except NotWhisperError as error:
        if check_files:
            yield Finding(("training.base_model",), str(error), name)
        return
    if dims is not None:
        yield from findings_on(spec, dims)
    else:
        yield from rank_findings(spec.training)
        yield advice("training.base_model", "is not on this machine: its modules are checked where the job runs", name)
        if name.endswith(".en") and not is_stored(name):
            yield from _english_only(spec)


def require_base(option: str, name: str) -> None:
    """Refuse a checkpoint whose name cannot be on the hub, or whose folder is none.

    Args:
        option: what an error calls it.
        name: hub id, local folder, or URI of a folder.

    Raises:
        SpecError: it is none.
    """
    faults = [finding.fault(option) for finding in _hub_name(option, name) if finding.fatal]
    if not faults and not is_stored(name):
        try:
            dims_of(name)
        except NotWhisperError as error:
            faults.append(Fault(option, str(error), name))
    if faults:
        raise SpecError(faults)


def require_model(spec: JobSpec, dims: WhisperDims) -> list[str]:
    """Check a spec against a checkpoint that only the cluster knows; the job calls this once its config is there.

    Returns:
        advice, one line each.

    Raises:
        SpecError: with every fault.
    """
    found = list(findings_on(spec, dims))
    if spec.kind == "search":
        found += space_findings(spec, lambda job: _at_a_point(job, dims))
    faults = [finding.fault(finding.settings[0]) for finding in found if finding.fatal]
    if faults:
        raise SpecError(faults)
    return [str(finding.fault(finding.settings[0])) for finding in found]


def findings_on(spec: JobSpec, dims: WhisperDims) -> Findings:
    """The checks that need the model's dims."""
    yield from module_findings(spec.training, modules(dims), dims)
    yield from shape_findings(spec.export, dims)
    if dims.english_only:
        yield from _english_only(spec)
    room = dims.max_target_positions - PROMPT_TOKENS
    if spec.evaluation.max_new_tokens > room:
        yield Finding(
            ("evaluation.max_new_tokens",),
            f"is more than the decoder's {dims.max_target_positions} positions hold; give {room} or less",
            spec.evaluation.max_new_tokens,
        )


def _english_only(spec: JobSpec) -> Findings:
    training = spec.training
    if training.language != "en":
        yield Finding(
            ("training.language", "training.base_model"),
            f"is not a language of {training.base_model}, which knows English only; take a checkpoint without `.en`",
            training.language,
        )


def _hub_name(setting: str, name: str) -> Findings:
    if is_uri(name):  # _addresses looks at it
        return
    if is_folder(name) or name in OPENAI:
        return
    elif guesses := [hub_id for hub_id in (f"openai/{name}", f"openai/whisper-{name}") if hub_id in OPENAI]:
        yield Finding((setting,), f"is neither a hub id nor a folder; did you mean {guesses[0]!r}?", name)
    elif not _is_hub_id(name):
        sizes = [hub_id.removeprefix(_WHISPER) for hub_id in OPENAI]
        close = nearest(name.rsplit("/", 1)[-1].removeprefix("whisper-").lower(), sizes)
        hint = f"did you mean {_WHISPER + close[0]!r}?" if close else f"give one such as '{_WHISPER}small'"
        yield Finding((setting,), f"is neither a folder on this machine nor a hub id; {hint}", name)
    elif name.startswith("openai/"):
        close = nearest(name, OPENAI)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        yield advice(setting, f"is no Whisper of OpenAI's that this version knows{hint}", name)


_WHISPER = "openai/whisper-"


def _is_hub_id(name: str) -> bool:
    owner, slash, repository = name.partition("/")
    return bool(slash) and all(
        part and part[0] not in "-." and part.replace("-", "").replace(".", "").replace("_", "").isalnum()
        for part in (owner, repository)
    )


def _credentials(spec: JobSpec) -> Findings:
    for path in PATHS + MODELS:
        section, name = path.split(".")
        value = getattr(getattr(spec, section), name)
        if value and _has_credentials(value):
            # The value stays out of the message: it holds a secret.
            yield Finding((path,), "holds credentials; those come from the environment, never from a spec")


def _addresses(spec: JobSpec) -> Findings:
    """URIs that are no addresses of files or of object storage, in any setting that holds a path."""
    for path in PATHS + MODELS:
        section, name = path.split(".")
        value = getattr(getattr(spec, section), name)
        if not value or _has_credentials(value) or (path == "storage.uri" and spec.training.outdir):
            continue
        if path in MODELS and value.startswith(("http://", "https://")) and "huggingface.co/" in value:
            parts = value.split("huggingface.co/", 1)[1].removeprefix("datasets/").split("/")
            yield Finding((path,), f"is a web address; give the hub id, {'/'.join(parts[:2])!r}", value)
        elif value.startswith(MEMORY):
            yield Finding((path,), "is in one process's memory, where no job finds it; give a path", value)
        elif problem := unknown_uri(value, "a hub id, a folder" if path in MODELS else _KIND.get(path, "a CSV")):
            yield Finding((path,), problem, value)


_KIND = {"training.outdir": "a folder", "storage.uri": "a folder"}


def _has_credentials(uri: str) -> bool:
    return is_uri(uri) and "@" in uri.split("://", 1)[1].split("/", 1)[0]


def _scored_model(spec: JobSpec) -> Findings:
    if spec.evaluation.model is not None:
        yield from _hub_name("evaluation.model", spec.evaluation.model)


_OF_TRAINING = (
    _required,
    _credentials,
    _addresses,
    _precision,
    _offload,
    init_findings,
    _resources,
    _dataset,
    _packing,
    _guard,
    _limits,
    _trackers,
    export_findings,
    _advice_on_training,
)

CHECKS: dict[str, tuple[Callable[[JobSpec], Findings], ...]] = {
    "train": (*_OF_TRAINING, idle_findings),
    "search": (*_OF_TRAINING, search_findings),
    "evaluate": (
        _required,
        _credentials,
        _addresses,
        _precision,
        _resources,
        _scored_model,
        _guard,
        _idle_training,
        idle_findings,
    ),
    "export": (
        _required,
        _credentials,
        _addresses,
        _resources,
        export_findings,
        _guard,
        _limits,
        _idle_training,
        idle_findings,
    ),
}
"""The checks that need nothing but the spec, by the kind of job."""
