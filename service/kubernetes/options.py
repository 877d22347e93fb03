"""What a manifest needs beside the spec; everything that is wrong with it is told at once."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass

from service.errors import Fault
from service.kubernetes.names import LABEL, LABEL_KEY, LABEL_VALUE, LONGEST_LABEL, LONGEST_RAYCLUSTER, SUBDOMAIN
from service.kubernetes.schedule import schedule_problem
from service.kubernetes.sizes import LEAST_MEMORY_GIB, gib_of

_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*(?::[0-9]{1,5})?/)?"
_IMAGE = re.compile(
    rf"{_HOST}{_PART}(?:/{_PART})*(?::(?P<tag>\w[\w.-]{{0,127}}))?(?P<digest>@sha256:[0-9a-f]{{64}})?", re.ASCII
)
"""As container registries read a name."""

TAKEN_PATHS = (
    *("/tmp", "/cache", "/dev", "/proc", "/sys", "/etc", "/opt", "/usr", "/bin", "/sbin", "/lib", "/lib64"),
    *("/var", "/run", "/root", "/home"),
)
"""Folders of a pod that hold something else."""

DEFAULT_TIME_ZONE = "Etc/UTC"
DEFAULT_CLUSTER = "whisper-jobs"


@dataclass(frozen=True)
class Mount:
    """A PersistentVolumeClaim, and where the pods see it."""

    claim: str
    path: str

    def __str__(self) -> str:
        return f"{self.claim}:{self.path}"

    @property
    def problem(self) -> str:
        """What is wrong with it; empty where nothing is."""
        parts = self.path.split("/")
        if not SUBDOMAIN.fullmatch(self.claim):
            return "does not begin with the name of a PersistentVolumeClaim; give CLAIM:/path"
        if not re.fullmatch(r"(/[\w.-]+)+", self.path, re.ASCII) or {".", ".."} & set(parts):
            return "has no absolute path (without a / at its end); give CLAIM:/path"
        if any(_lies_in(self.path, taken) for taken in TAKEN_PATHS):
            return "is a folder of the pod that holds something else; give one such as /data"
        return ""

    def holds(self, path: str) -> bool:
        """Whether a path lies in it."""
        return not self.problem and _lies_in(path, self.path)


@dataclass(frozen=True)
class RenderOptions:
    """What a manifest needs beside the spec; None and empty: it was not given.

    Attributes:
        image: whisper-jobs' own.
        namespace: that holds the secrets and service accounts of k8s/base.
        schedule: of a CronJob, five fields; None: a RayJob that runs once.
        time_zone: of the schedule.
        suspend: whether the schedule rests.
        cluster: the long-lived RayCluster that a scheduled job is submitted to.
        queue: of Kueue.
        memory: of a worker pod.
        spot: whether workers run on spot nodes, and there alone.
        node_selector: labels of the workers' nodes, each KEY=VALUE.
        mounts: volumes that head and workers share.
        pull_secret: for the image.
    """

    image: str
    namespace: str = "whisper-jobs"
    schedule: str | None = None
    time_zone: str | None = None
    suspend: bool = False
    cluster: str | None = None
    queue: str | None = None
    memory: str | None = None
    spot: bool = False
    node_selector: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    pull_secret: str | None = None

    @property
    def node_labels(self) -> dict[str, str]:
        """`node_selector`, as Kubernetes wants it."""
        return dict(_pair(word) for word in self.node_selector)

    def faults(self) -> Iterator[Fault]:
        """What is wrong with them, by the names that they have on the command line."""
        if not _IMAGE.fullmatch(self.image):
            yield Fault("--image", "is no name of an image; give REGISTRY/NAME:TAG", self.image)
        for flag, name, longest in (
            ("--namespace", self.namespace, LONGEST_LABEL),
            ("--cluster", self.cluster, LONGEST_RAYCLUSTER),
        ):
            if name is not None and not (LABEL.fullmatch(name) and len(name) <= longest):
                text = (
                    f"is no name that Kubernetes takes: a letter, then letters, digits and -, {longest} at most, small"
                )
                yield Fault(flag, text, name)
        for flag, name in (("--queue", self.queue), ("--pull-secret", self.pull_secret)):
            if name is not None and not (SUBDOMAIN.fullmatch(name) and len(name) <= LONGEST_LABEL):
                what = "LocalQueue" if flag == "--queue" else "secret"
                yield Fault(flag, f"is no name of a {what}: small letters, digits, - and .", name)
        if self.memory is not None:
            amount = gib_of(self.memory)
            if amount is None:
                yield Fault("--memory", "is no amount of memory; give a whole number with its unit: 24Gi", self.memory)
            elif amount < LEAST_MEMORY_GIB:
                yield Fault("--memory", f"is too little for a pod; give {LEAST_MEMORY_GIB}Gi or more", self.memory)
        yield from self._placement_faults()
        yield from self._fitting_faults()
        if self.schedule is not None and (problem := schedule_problem(self.schedule)):
            yield Fault("--schedule", problem, self.schedule)
        zones = zoneinfo.available_timezones()
        if self.time_zone is not None and zones and self.time_zone not in zones:
            yield Fault("--time-zone", "is no time zone; give one such as Europe/Amsterdam", self.time_zone)

    @property
    def notes(self) -> list[str]:
        """What is allowed, but worth knowing."""
        image = _IMAGE.fullmatch(self.image)
        if image and not image["digest"] and image["tag"] in (None, "latest"):
            return [f"--image {self.image}: the next pull may bring another image; give a tag that stays, or a digest"]
        return []

    def _placement_faults(self) -> Iterator[Fault]:
        for word in self.node_selector:
            key, value = _pair(word)
            if "=" not in word or not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
                yield Fault("--node-selector", "is no label of a node; give KEY=VALUE", word)
        keys = [_pair(word)[0] for word in self.node_selector]
        paths = [mount.path for mount in self.mounts]
        for flag, names in (("--node-selector", keys), ("--mount", paths)):
            for name in dict.fromkeys(name for name in names if names.count(name) > 1):
                yield Fault(flag, "is given twice", name)
        for mount in self.mounts:
            if mount.problem:
                yield Fault("--mount", mount.problem, str(mount))

    def _fitting_faults(self) -> Iterator[Fault]:
        """Options of the one kind of job that were given for the other."""
        if self.schedule is None:
            for flag, given in (
                ("--time-zone", self.time_zone),
                ("--suspend", self.suspend),
                ("--cluster", self.cluster),
            ):
                if given:
                    yield Fault(flag, "is for a scheduled job; give --schedule too, or leave it out", given)
            return
        if self.queue is not None:
            text = (
                "holds a RayJob back until there is room; a scheduled job is submitted to a RayCluster that is there, "
                "and waits there as resources.wait_s says: leave one of the two out"
            )
            yield Fault("--queue", text, self.queue)
        for flag, value in (
            ("--memory", self.memory),
            ("--spot", self.spot),
            ("--node-selector", " ".join(self.node_selector)),
            ("--mount", " ".join(map(str, self.mounts))),
        ):
            if value:
                text = "is of a job's own pods; a scheduled job runs on the RayCluster's, which k8s/overlays describe"
                yield Fault(flag, text, value)


def _pair(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key, value


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")
