"""A spec as manifests: valid whatever the spec, with resources from it, and all that is wrong told at once."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from manifests import needs_crds, problems
from objectstore import BUCKET

from service.cli.main import cli
from service.errors import SpecError
from service.kubernetes import Mount, RenderOptions, check, render
from service.kubernetes.names import label_of
from service.kubernetes.options import schedule_problem
from service.kubernetes.rules import pod_templates
from service.kubernetes.sizes import workers_of
from service.spec.flags import Override
from service.spec.job import JobSpec
from service.spec.load import load_spec

IMAGE = "registry.example/team/whisper-jobs:0.1.0-cuda"
OPTIONS = RenderOptions(IMAGE)
DATA = {
    "training.train_csv": "s3://speech/data/train.csv",
    "training.val_csv": "s3://speech/data/val.csv",
    "storage.uri": "s3://speech/runs",
}


def spec_of(**settings: Any) -> JobSpec:
    """A checked spec; `resources__workers=2` sets `resources.workers`."""
    values = DATA | {name.replace("__", "."): value for name, value in settings.items()}
    return load_spec(None, [Override(path, value, path) for path, value in values.items()], check_files=False).spec


def by_kind(spec: JobSpec, options: RenderOptions = OPTIONS) -> dict[str, Any]:
    return {manifest["kind"]: manifest for manifest in render(spec, options).manifests}


def worker_group(spec: JobSpec, options: RenderOptions = OPTIONS) -> dict[str, Any]:
    group: dict[str, Any] = by_kind(spec, options)["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return group


# Any spec


def some_spec(seed: int) -> tuple[JobSpec, RenderOptions]:
    """A valid spec and options, drawn at random over what manifests depend on."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789._-"
    while True:
        kind = draw.choice(["train", "search", "search", "evaluate", "export"])
        name = "".join(draw.choice(letters) for _ in range(draw.randint(1, 40)))
        values: dict[str, Any] = {
            "kind": kind,
            "name": draw.choice([None, name]),
            "training.base_model": draw.choice(
                [
                    "openai/whisper-tiny",
                    "openai/whisper-large-v3-turbo",
                    "someone/whisper-of-their-own",
                    "s3://models/mine",
                ]
            ),
            "training.language": draw.choice(["en", "nl", None]),
            "training.use_dora": draw.choice([True, False]),
            "training.lora_r": draw.choice([1, 8, 64]),
            "training.per_dev_batch": draw.choice([draw.randint(1, 64), "auto"]),
            "training.lora_rank_pattern": draw.choice([None, {"fc1": 4, "q_proj": 2}]),
            "resources.workers": draw.randint(0, 16),
            "resources.gpus_per_worker": draw.choice([None, 0, 0.1, 0.25, 0.5, 1, 2, 8]),
            "resources.cpus_per_worker": draw.choice([0.5, 1, 2.5, 16]),
            "resources.min_workers": draw.choice([None, 1]),
            "export.formats": draw.choice([["hf"], ["hf", "ggml-q8_0"]]),
            "data.text": draw.choice([None, {"replace": [{"pattern": "[$`\\\\]", "by": "'\"\u2028 é {{ }}"}]}]),
        }
        if kind == "search":
            # A small space: all its points are checked, each time.
            values |= {"search.space": {"lora_alpha": draw.choice([[8, 16], [32, 64, 128]])}}
            values |= {"search.trials": draw.randint(1, 40), "search.concurrent": draw.choice([None, 1, 3, 12])}
        else:
            values |= {"evaluation.model": "openai/whisper-small", "evaluation.csv": "s3://speech/data/test.csv"}
        if kind == "export":
            values |= {"export.source": "s3://speech/adapters/mine", "export.base": "openai/whisper-small"}
        scheduled = draw.random() < 0.3
        if not scheduled and draw.random() < 0.3:
            values["training.outdir"] = draw.choice(["s3://speech/one", "gs://speech/b c$d", "/data/runs/x"])
        options = RenderOptions(
            draw.choice([IMAGE, "whisper-jobs", f"host:5000/a/b@sha256:{'0' * 64}"]),
            namespace=draw.choice(["whisper-jobs", "team-a"]),
            schedule=draw.choice(["0 2 * * *", "*/30 1-5 * JAN-MAR MON,WED", "@daily"]) if scheduled else None,
            time_zone=draw.choice([None, "Europe/Amsterdam"]) if scheduled else None,
            suspend=scheduled and draw.random() < 0.5,
            queue="speech" if not scheduled and draw.random() < 0.4 else None,
            memory=None if scheduled else draw.choice([None, None, "4096Mi", "64Gi"]),
            spot=not scheduled and draw.random() < 0.5,
            node_selector=() if scheduled else draw.choice([(), ("nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3",)]),
            mounts=() if scheduled else (Mount("shared-data", "/data"),),
            pull_secret=draw.choice([None, "registry"]),
        )
        try:
            given = {path: value for path, value in (DATA | values).items() if value is not None}
            spec = load_spec(None, [Override(p, v, p) for p, v in given.items()], check_files=False).spec
            render(spec, options)
        except SpecError:
            continue  # the draw has made one that is refused, as it should be
        return spec, options


@needs_crds
def test_two_hundred_random_specs_give_manifests_that_a_cluster_takes() -> None:
    names, kinds = {}, set()
    for seed in range(200):
        spec, options = some_spec(seed)
        manifests = list(yaml.safe_load_all(render(spec, options).to_yaml()))
        found = [problem for manifest in manifests for problem in problems(manifest)]
        assert found == [], (seed, spec.job_id)
        assert check(manifests) == [], (seed, spec.job_id)
        config, job = manifests
        assert JobSpec.model_validate_json(config["data"]["spec.json"]) == spec
        assert len(job["metadata"]["name"]) <= (47 if job["kind"] == "RayJob" else 31)
        names.setdefault((job["kind"], job["metadata"]["name"]), set()).add(
            spec.job_id if job["kind"] == "RayJob" else spec.title
        )
        kinds.add((spec.kind, job["kind"], options.queue is not None))
    assert all(len(ids) == 1 for ids in names.values())
    assert {(kind, "RayJob", queued) for kind in ("train", "search") for queued in (True, False)} <= kinds
    assert {("train", "CronJob", False), ("search", "CronJob", False)} <= kinds


@pytest.mark.parametrize(
    ("text", "longest", "label"),
    [
        ("turbo-lora-1a2b3c4d", 47, "turbo-lora-1a2b3c4d"),
        ("2nd.try_of-it", 47, "j-2nd-try-of-it-"),
        ("a" * 60, 47, "a" * 38 + "-"),
        ("._.", 47, "j-"),
        ("a.b", 31, "a-b-"),
    ],
)
def test_a_name_becomes_one_that_kubernetes_takes(text: str, longest: int, label: str) -> None:
    made = label_of(text, longest)

    assert made.startswith(label)
    assert len(made) <= longest
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made)
    assert label_of(text + "b", longest) != made


# Resources


SHARED = {"kind": "search", "resources__workers": 1}
EXPORT = {"kind": "export", "export__source": "s3://speech/adapter", "export__base": "openai/whisper-small"}


def test_trials_that_train_together_share_a_pod() -> None:
    spec = spec_of(**SHARED, search__concurrent=16, training__freeze_encoder=True)

    assert worker_group(spec)["replicas"] == 2, "8 trials in each"


@pytest.mark.parametrize(
    ("settings", "pods", "cpus", "gpus"),
    [
        ({"resources__workers": 2, "resources__gpus_per_worker": 1, "resources__cpus_per_worker": 4}, 2, 4, 1),
        ({"resources__workers": 3}, 3, 1, 1),
        ({"resources__workers": 3, "resources__gpus_per_worker": 0}, 3, 1, 0),
        ({"resources__workers": 2, "resources__gpus_per_worker": 2}, 2, 1, 2),
        ({"kind": "search", "search__concurrent": 4, "resources__workers": 2}, 8, 1, 1),
        ({"kind": "search", "search__concurrent": 4, "resources__workers": 0}, 4, 1, 1),
        (
            SHARED | {"search__concurrent": 5, "resources__gpus_per_worker": 0.25, "resources__cpus_per_worker": 1.5},
            2,
            6,
            1,
        ),
        (SHARED | {"search__concurrent": 6, "resources__gpus_per_worker": 0.5}, 3, 2, 1),
        (SHARED, 1, 1, 1),
        (EXPORT | {"resources__workers": 4, "resources__gpus_per_worker": 2}, 1, 1, 1),
    ],
)
def test_pods_hold_what_the_spec_asks_for(settings: dict[str, Any], pods: int, cpus: int, gpus: int) -> None:
    spec = spec_of(**settings)
    group = worker_group(spec)
    container = group["template"]["spec"]["containers"][0]

    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (pods, pods, pods)
    assert group["rayStartParams"]["num-cpus"] == str(cpus)
    assert int(container["resources"]["requests"]["cpu"]) > cpus
    assert container["resources"]["limits"].get("nvidia.com/gpu") == (str(gpus) if gpus else None)
    asked = spec.resources
    each = 1.0 if asked.gpus_per_worker is None else asked.gpus_per_worker
    at_once = (spec.search.concurrent or 1) if spec.kind == "search" else 1
    workers = max(1, asked.workers) * at_once
    if spec.kind != "export":  # which does all in one task
        assert pods * cpus >= workers * asked.cpus_per_worker
        assert pods * gpus >= workers * each


def test_memory_grows_with_the_model_and_is_said_to_be_a_guess_for_an_unknown_one() -> None:
    small, large = (spec_of(training__base_model=f"openai/whisper-{name}") for name in ("small", "large-v3"))
    unknown = workers_of(spec_of(training__base_model="someone/whisper-of-their-own"))

    assert int(workers_of(small).memory[:-2]) < int(workers_of(large).memory[:-2])
    assert any("--memory" in note for note in unknown.notes)
    assert (
        worker_group(large, RenderOptions(IMAGE, memory="99Gi"))["template"]["spec"]["containers"][0]["resources"][
            "limits"
        ]["memory"]
        == "99Gi"
    )


def test_workers_go_where_they_are_told_and_the_head_stays_off_spot_nodes() -> None:
    options = RenderOptions(IMAGE, spot=True, node_selector=("zone=a",), mounts=(Mount("data", "/data"),))
    cluster = by_kind(spec_of(), options)["RayJob"]["spec"]["rayClusterSpec"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    head = cluster["headGroupSpec"]["template"]["spec"]

    def terms(pod: dict[str, Any]) -> list[set[tuple[str, str]]]:
        required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        return [{(e["key"], e["operator"]) for e in term["matchExpressions"]} for term in required["nodeSelectorTerms"]]

    assert worker["nodeSelector"] == {"zone": "a"}
    assert [operator for term in terms(worker) for _, operator in term] == ["In"] * 4, "any one of them is enough"
    assert len(terms(head)) == 1, "all of them must hold"
    assert {operator for _, operator in terms(head)[0]} == {"NotIn"}
    assert {key for term in terms(worker) for key, _ in term} == {key for key, _ in terms(head)[0]}
    for pod in (head, worker):
        assert {"name": "mount-0", "persistentVolumeClaim": {"claimName": "data"}} in pod["volumes"]
        assert {"name": "mount-0", "mountPath": "/data"} in pod["containers"][0]["volumeMounts"]


# What is done with it


def test_a_rayjob_runs_the_jobs_program_on_the_spec_of_its_config_map() -> None:
    spec = spec_of(name="turbo-lora")
    made = by_kind(spec)
    job, config = made["RayJob"], made["ConfigMap"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}

    assert config["immutable"] is True
    assert {"name": "spec", "configMap": {"name": config["metadata"]["name"]}} in head["volumes"]
    path = f"{mounts['spec']}/{next(iter(config['data']))}"
    assert job["spec"]["entrypoint"] == f"python -m jobs.main --config {path} --no-warnings"
    assert job["spec"]["metadata"]["job_id"] == spec.job_id
    assert job["spec"]["metadata"]["root"] == spec.root
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "whisper-jobs-token"}
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_nothing_that_a_shell_would_change_is_in_the_metadata() -> None:
    metadata = by_kind(spec_of(training__outdir="s3://speech/$(rm -rf x)"))["RayJob"]["spec"]["metadata"]

    assert "root" not in metadata
    assert not any(set('$`"\\') & set(value) for value in metadata.values())


def test_a_spec_that_is_another_gets_another_config_map_also_where_it_makes_no_other_job() -> None:
    """A ConfigMap of the same name and another content would be refused: it cannot be changed."""
    for options in (OPTIONS, RenderOptions(IMAGE, schedule="@daily")):
        one, other = (
            by_kind(spec_of(resources__wait_s=wait_s, resources__gpus_per_worker=1), options) for wait_s in (300, 1000)
        )
        assert one["ConfigMap"]["metadata"]["name"] != other["ConfigMap"]["metadata"]["name"]
        kind = "RayJob" if options is OPTIONS else "CronJob"
        assert one[kind]["metadata"]["name"] == other[kind]["metadata"]["name"]
        assert f"name: {one['ConfigMap']['metadata']['name']}\n" in yaml.safe_dump(one[kind])


def test_a_rayjob_that_is_not_called_as_its_run_says_where_the_results_go() -> None:
    spec = spec_of(name="my_long.name")

    assert any(spec.root in note for note in render(spec, OPTIONS).notes)
    assert not any("RayJob is called" in note for note in render(spec_of(name="plain"), OPTIONS).notes)


def test_a_scheduled_job_says_what_its_cluster_must_have() -> None:
    scheduled = RenderOptions(IMAGE, schedule="@daily")

    with pytest.raises(SpecError, match="gpus_per_worker: is not set"):
        render(spec_of(), scheduled)
    spec = spec_of(resources__gpus_per_worker=2, resources__cpus_per_worker=8)
    assert "8 CPUs and 2 GPUs for each worker" in " ".join(render(spec, scheduled).notes)
    spec = spec_of(resources__gpus_per_worker=1, resources__cpus_per_worker=1)
    assert "1 CPU and 1 GPU for each worker" in " ".join(render(spec, scheduled).notes)


def test_with_a_queue_the_job_is_suspended_and_gives_its_room_back() -> None:
    job = by_kind(spec_of(), RenderOptions(IMAGE, queue="speech"))["RayJob"]

    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "speech"
    assert (job["spec"]["suspend"], job["spec"]["shutdownAfterJobFinishes"]) == (True, True)
    assert job["spec"]["ttlSecondsAfterFinished"] == 0, "Kueue gives the room away at the job's end"
    assert "deletionStrategy" not in job["spec"]
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]
    assert "suspend" not in by_kind(spec_of())["RayJob"]["spec"]


def test_a_schedule_is_a_cron_job_that_submits_under_a_name_of_its_own_each_time() -> None:
    spec = spec_of(kind="search", name="x" * 40, resources__gpus_per_worker=1)
    options = RenderOptions(IMAGE, schedule="0 2 * * *", time_zone="Europe/Amsterdam", suspend=True, cluster="big")
    made = by_kind(spec, options)
    cron = made["CronJob"]["spec"]
    pod = cron["jobTemplate"]["spec"]["template"]["spec"]
    container = pod["containers"][0]

    assert set(made) == {"ConfigMap", "CronJob"}
    assert (cron["schedule"], cron["timeZone"], cron["suspend"]) == ("0 2 * * *", "Europe/Amsterdam", True)
    assert (cron["concurrencyPolicy"], cron["successfulJobsHistoryLimit"]) == ("Forbid", 3)
    assert container["command"] == [
        *("whisper-jobs", "submit", "/etc/whisper-jobs/spec.json", "--set", "name=$(JOB_NAME)", "--wait"),
        *("--address", "http://big-head-svc:8265"),
    ]
    # Kubernetes names the night's job so: the minute since 1970 is added, of 8 digits for the next hundred years.
    named = f"{made['CronJob']['metadata']['name']}-29851560"
    assert JobSpec(name=named).name == named
    sources = {entry["name"]: entry.get("valueFrom") for entry in container["env"]}
    assert sources["JOB_NAME"] == {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    assert sources["RAY_AUTH_TOKEN"] == {"secretKeyRef": {"name": "whisper-jobs-token", "key": "auth_token"}}


def test_no_secret_of_this_machine_is_in_a_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN"):
        monkeypatch.setenv(name, f"planted-{name}")

    for options in (OPTIONS, RenderOptions(IMAGE, schedule="@daily")):
        assert "planted-" not in render(spec_of(resources__gpus_per_worker=1), options).to_yaml()


# What is refused


def test_everything_that_the_pods_would_not_see_is_told_at_once(tmp_path: Path) -> None:
    spec = spec_of(
        training__train_csv="/home/me/train.csv", training__val_csv="/data/val.csv", storage__uri="./runs",
        training__base_model="/models/mine", resources__workers=0,
    )  # fmt: skip

    with pytest.raises(SpecError) as caught:
        render(spec, RenderOptions(IMAGE, mounts=(Mount("data", "/data"),)))

    places = [fault.where for fault in caught.value.faults]
    assert places == ["training.train_csv", "storage.uri", "training.base_model", "resources.workers"]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "flag", "said"),
    [
        ({"image": "Registry/UPPER"}, "--image", "REGISTRY/NAME:TAG"),
        ({"image": "two words"}, "--image", "no name of an image"),
        ({"namespace": "Not_One"}, "--namespace", "no name that Kubernetes takes"),
        ({"schedule": "@daily", "cluster": "a" * 54}, "--cluster", "53"),
        ({"queue": "A_b"}, "--queue", "LocalQueue"),
        ({"memory": "lots"}, "--memory", "24Gi"),
        ({"memory": "16G"}, "--memory", "24Gi"),
        ({"node_selector": ("a b=c",)}, "--node-selector", "KEY=VALUE"),
        ({"node_selector": ("gpu",)}, "--node-selector", "KEY=VALUE"),
        ({"node_selector": ("a=b", "a=c")}, "--node-selector", "twice"),
        ({"memory": "1Gi"}, "--memory", "4Gi or more"),
        ({"time_zone": "Etc/UTC"}, "--time-zone", "--schedule too"),
        ({"suspend": True}, "--suspend", "--schedule too"),
        ({"cluster": "big"}, "--cluster", "--schedule too"),
        ({"schedule": "@daily", "spot": True}, "--spot", "k8s/overlays"),
        ({"schedule": "@daily", "memory": "24Gi"}, "--memory", "k8s/overlays"),
        ({"schedule": "@daily", "node_selector": ("a=b",)}, "--node-selector", "k8s/overlays"),
        ({"schedule": "@daily", "mounts": (Mount("a", "/data"),)}, "--mount", "k8s/overlays"),
        ({"image": "a" + ".a" * 200 + "!"}, "--image", "no name of an image"),
        ({"mounts": (Mount("data", "/data/"),)}, "--mount", "at its end"),
        ({"mounts": (Mount("data", "/home/ray"),)}, "--mount", "something else"),
        ({"mounts": (Mount("data", "data"),)}, "--mount", "absolute"),
        ({"mounts": (Mount("data", "/data/../etc"),)}, "--mount", "absolute"),
        ({"mounts": (Mount("data", "/tmp/x"),)}, "--mount", "something else"),
        ({"mounts": (Mount("Data", "/data"),)}, "--mount", "PersistentVolumeClaim"),
        ({"mounts": (Mount("a", "/data"), Mount("b", "/data"))}, "--mount", "twice"),
        ({"schedule": "0 2 * *"}, "--schedule", "4 fields"),
        ({"schedule": "0 2 * * *", "time_zone": "Mars/Olympus"}, "--time-zone", "Europe/Amsterdam"),
        ({"schedule": "0 2 * * *", "queue": "speech"}, "--queue", "leave one"),
        ({"pull_secret": "My Secret"}, "--pull-secret", "secret"),
    ],
)
def test_a_bad_option_is_named_with_the_way_out(options: dict[str, Any], flag: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        render(spec_of(resources__gpus_per_worker=1), RenderOptions(**({"image": IMAGE} | options)))

    (fault,) = caught.value.faults
    assert fault.where == flag
    assert said in str(fault)


def test_one_root_for_every_night_is_refused() -> None:
    with pytest.raises(SpecError, match=r"training\.outdir: .* one root for all nights"):
        spec = spec_of(training__outdir="s3://speech/one", resources__gpus_per_worker=0)
        render(spec, RenderOptions(IMAGE, schedule="@daily"))


@pytest.mark.parametrize(
    "schedule", ["0 2 * * *", "*/15 0-6,22 1 * ?", "5 4 * JAN-mar Sun", "@hourly", "0 0 1,15 * 1-5/2", "0 0 * * 0"]
)
def test_a_schedule_that_kubernetes_takes_is_taken(schedule: str) -> None:
    assert schedule_problem(schedule) == ""


@pytest.mark.parametrize(
    "schedule",
    [
        *(
            "",
            "* * * *",
            "0 2 * * * *",
            "60 * * * *",
            "0 24 * * *",
            "0 0 0 * *",
            "0 0 * 13 *",
            "0 0 * * 7",
            "5-1 * * * *",
        ),
        *("*/0 * * * *", "a * * * *", "@fortnightly", "TZ=UTC 0 2 * * *", "0 2 * * L", "1-2-3 * * * *", "0,, * * * *"),
    ],
)
def test_a_schedule_that_kubernetes_refuses_is_refused(schedule: str) -> None:
    assert schedule_problem(schedule)


def test_an_image_that_may_change_is_noted() -> None:
    assert "a tag that stays" in render(spec_of(), RenderOptions("whisper-jobs")).notes[0]
    assert "a tag that stays" in render(spec_of(), RenderOptions("host:5000/whisper-jobs:latest")).notes[0]
    assert not any("tag" in note for note in render(spec_of(), RenderOptions(f"w@sha256:{'1' * 64}")).notes)


# The command


def run(*words: str) -> tuple[int, str, str]:
    """Through the outermost edge, where errors become messages and codes."""
    result = CliRunner().invoke(cli, ["k8s", *words])
    return result.exit_code, result.stdout, result.stderr


SETTINGS = [word for path, value in DATA.items() for word in ("--set", f"{path}={value}")]


def test_the_command_prints_yaml_or_json_of_the_same_manifests() -> None:
    code, text, notes = run("render", "--image", IMAGE, *SETTINGS)
    _, as_json, _ = run("render", "--image", IMAGE, *SETTINGS, "-o", "json")

    assert code == 0
    assert json.loads(as_json) == {"apiVersion": "v1", "kind": "List", "items": list(yaml.safe_load_all(text))}
    assert "note: resources.gpus_per_worker is not set" in notes


def test_the_command_tells_faults_of_spec_and_options_with_exit_code_2() -> None:
    code, text, errors = run(
        "render", "--image", "UPPER", "--memory", "x", "--train-csv", "a.csv", "--val-csv", "b.csv"
    )

    assert (code, text) == (2, "")
    for place in ("--image", "--memory", "training.train_csv", "training.val_csv", "storage.uri"):
        assert f"  {place}: " in errors
    code, _, errors = run("render", "--image", IMAGE, "--lora-r", "-3")
    assert code == 2
    assert "--lora-r" in errors


@pytest.mark.usefixtures("client")
def test_with_upload_what_is_here_is_sent_and_the_pods_read_it_there(folder: Path, prefix: str) -> None:
    (folder / "a.wav").write_bytes(b"not heard by anybody")
    (folder / "b.wav").write_bytes(b"neither is this one")
    (folder / "val.csv").write_text("path,text\nb.wav,held out\n")
    words = ["--train-csv", "train.csv", "--val-csv", "val.csv", "--set", f"storage.uri=s3://{BUCKET}/{prefix}"]

    code, text, errors = run("render", "--image", IMAGE, "--upload", *words)

    assert code == 0, errors
    config, _ = yaml.safe_load_all(text)
    spec = JobSpec.model_validate_json(config["data"]["spec.json"])
    assert spec.training.train_csv.startswith(f"s3://{BUCKET}/{prefix}/uploads/")
    from service.storage import Storage

    parent, _, name = spec.training.train_csv.rpartition("/")
    assert Storage(parent).exists(name)


def test_a_refused_manifest_uploads_nothing(folder: Path) -> None:
    code, _, errors = run(
        *("render", "--image", "UPPER", "--upload", "--train-csv", "train.csv", "--val-csv", "val.csv"),
        *("--set", f"storage.uri={folder}/runs"),
    )

    assert code == 2
    assert not (folder / "runs").exists(), errors


def test_every_pod_of_a_manifest_is_found() -> None:
    assert [place for place, _, _ in pod_templates(by_kind(spec_of())["RayJob"])] == [
        "spec.rayClusterSpec.headGroupSpec.template",
        "spec.rayClusterSpec.workerGroupSpecs[0].template",
        "spec.submitterPodTemplate",
    ]
