"""What a manifest needs beside the spec; everything that is wrong with it is told at once."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass, field

from service.errors import Fault
from service.kubernetes.names import LABEL, LONGEST_LABEL, LONGEST_RAYCLUSTER, SUBDOMAIN
from service.kubernetes.sizes import QUANTITY

_IMAGE = re.compile(
    r"(?P<name>[a-z0-9]+([._-]+[a-z0-9]+)*([.:][a-z0-9.-]+)*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)"
    r"(:(?P<tag>[\w][\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")

TAKEN_PATHS = ("/tmp", "/cache", "/dev", "/proc", "/sys", "/etc", "/opt", "/usr", "/bin", "/lib", "/var/run")
"""Folders of a pod that hold something else."""

_MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
_FIELDS: tuple[tuple[str, int, int, list[str]], ...] = (
    ("minute", 0, 59, []),
    ("hour", 0, 23, []),
    ("day of the month", 1, 31, []),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 6, _DAYS),
)
_MACROS = {"@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"}


@dataclass(frozen=True)
class Mount:
    """A PersistentVolumeClaim, and where the pods see it."""

    claim: str
    path: str

    def holds(self, path: str) -> bool:
        """Whether a path lies in it."""
        return bool(self.path) and _lies_in(path, self.path)


@dataclass(frozen=True)
class RenderOptions:
    """What a manifest needs beside the spec.

    Attributes:
        image: whisper-jobs' own.
        namespace: that holds the secrets and service accounts of k8s/base.
        schedule: of a CronJob, five fields; None: a RayJob that runs once.
        time_zone: of the schedule.
        suspend: whether the schedule rests.
        queue: of Kueue.
        cluster: the long-lived RayCluster that a scheduled job is submitted to.
        memory: of a worker pod.
        spot: whether workers run on spot nodes, and there alone.
        node_selector: labels of the workers' nodes.
        mounts: volumes that head and workers share.
        pull_secret: for the image.
    """

    image: str
    namespace: str = "whisper-jobs"
    schedule: str | None = None
    time_zone: str = "Etc/UTC"
    suspend: bool = False
    queue: str | None = None
    cluster: str = "whisper-jobs"
    memory: str | None = None
    spot: bool = False
    node_selector: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    pull_secret: str | None = None

    def faults(self) -> Iterator[Fault]:
        """What is wrong with them, by the names that they have on the command line."""
        image = _IMAGE.fullmatch(self.image)
        if not image:
            yield Fault("--image", "is no name of an image; give REGISTRY/NAME:TAG", self.image)
        if not _is_label(self.namespace):
            yield Fault("--namespace", _label_text(LONGEST_LABEL), self.namespace)
        if not _is_label(self.cluster, LONGEST_RAYCLUSTER):
            yield Fault("--cluster", _label_text(LONGEST_RAYCLUSTER), self.cluster)
        if self.queue is not None and not (SUBDOMAIN.fullmatch(self.queue) and len(self.queue) <= LONGEST_LABEL):
            yield Fault("--queue", "is no name of a LocalQueue (small letters, digits, - and .)", self.queue)
        if self.pull_secret is not None and not SUBDOMAIN.fullmatch(self.pull_secret):
            yield Fault("--pull-secret", "is no name of a secret (small letters, digits, - and .)", self.pull_secret)
        if self.memory is not None and not QUANTITY.fullmatch(self.memory):
            yield Fault("--memory", "is no amount of memory; give a whole number with its unit: 24Gi", self.memory)
        for key, value in self.node_selector.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                yield Fault("--node-selector", "is no label of a node; give KEY=VALUE", f"{key}={value}")
        yield from self._mount_faults()
        if self.schedule is not None:
            yield from self._schedule_faults(self.schedule)

    @property
    def notes(self) -> list[str]:
        """What is allowed, but worth knowing."""
        image = _IMAGE.fullmatch(self.image)
        if image and not image["digest"] and image["tag"] in (None, "latest"):
            return [f"--image {self.image}: the next pull may bring another image; give a tag that stays, or a digest"]
        return []

    def _mount_faults(self) -> Iterator[Fault]:
        seen: set[str] = set()
        for mount in self.mounts:
            shown = f"{mount.claim}:{mount.path}"
            if not SUBDOMAIN.fullmatch(mount.claim):
                yield Fault("--mount", "does not begin with the name of a PersistentVolumeClaim", shown)
            if not re.fullmatch(r"(/[\w.-]+)+", mount.path) or ".." in mount.path.split("/"):
                yield Fault("--mount", "has no absolute path; give CLAIM:/path", shown)
            elif any(_lies_in(mount.path, taken) for taken in TAKEN_PATHS):
                yield Fault(
                    "--mount", "is a folder of the pod that holds something else; give one such as /data", shown
                )
            if mount.path in seen:
                yield Fault("--mount", "is given twice for one path", shown)
            seen.add(mount.path)

    def _schedule_faults(self, schedule: str) -> Iterator[Fault]:
        if self.queue is not None:
            text = (
                "holds a RayJob back until there is room; a scheduled job is submitted to a RayCluster that is there, "
                "and waits there as resources.wait_s says: leave one of the two out"
            )
            yield Fault("--queue", text, self.queue)
        if problem := schedule_problem(schedule):
            yield Fault("--schedule", problem, schedule)
        zones = zoneinfo.available_timezones()
        if zones and self.time_zone not in zones:
            yield Fault("--time-zone", "is no time zone; give one such as Europe/Amsterdam", self.time_zone)


def schedule_problem(schedule: str) -> str:
    """What keeps a schedule from being one that Kubernetes takes; empty where nothing does."""
    if "TZ" in schedule:
        return "names a time zone; give it with --time-zone"
    if schedule.startswith("@"):
        return "" if schedule in _MACROS else f"is not one of {', '.join(sorted(_MACROS))}"
    parts = schedule.split()
    if len(parts) != len(_FIELDS):
        return f'has {len(parts)} fields, not 5 (minute, hour, day, month, weekday); "0 2 * * *" is two in the night'
    for part, (what, least, most, names) in zip(parts, _FIELDS, strict=True):
        if not all(_is_range(one, least, most, names) for one in part.split(",")):
            return f"has {part!r} as its {what}; {least} to {most}, *, ranges 1-5, lists 1,3 and steps */15 are known"
    return ""


def _is_range(text: str, least: int, most: int, names: list[str]) -> bool:
    """Whether it is one part of a field: `*`, a number or a range of them, with or without a step."""
    span, _, step = text.partition("/")
    if "/" in text and not (step.isascii() and step.isdigit() and int(step) >= 1):
        return False
    if span in ("*", "?"):
        return True
    ends = span.split("-")
    numbers = [_number(end, least, names) for end in ends]
    if len(numbers) > 2 or any(number is None or not least <= number <= most for number in numbers):
        return False
    return len(numbers) == 1 or (numbers[0] or 0) <= (numbers[1] or 0)


def _number(text: str, least: int, names: list[str]) -> int | None:
    if text.upper() in names:
        return names.index(text.upper()) + least
    return int(text) if text.isascii() and text.isdigit() else None


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _is_label(text: str, longest: int = LONGEST_LABEL) -> bool:
    return bool(LABEL.fullmatch(text)) and len(text) <= longest


def _label_text(longest: int) -> str:
    return f"is no name that Kubernetes takes: small letters, digits and -, beginning with a letter, {longest} at most"
