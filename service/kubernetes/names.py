"""Names that Kubernetes takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

LONGEST_RAYJOB = 47
"""KubeRay adds a hash of 6 characters for the cluster, and `-serve-svc` for a service; a label has 63."""

LONGEST_RAYCLUSTER = 53
LONGEST_CRONJOB = 52
"""Kubernetes adds a dash and the minute, and its jobs' names are labels."""

LONGEST_LABEL = 63

LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""A DNS label that begins with a letter, as services want it (RFC 1035)."""

SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
"""What most objects may be called (RFC 1123)."""

LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
"""Labels of objects and nodes."""

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
"""By which Kueue knows whose turn a job waits for."""

_HASH = 8


def label_of(text: str, longest: int) -> str:
    """A DNS label for a name; where it is another one, it ends with a hash of the name, so that no two are alike.

    Args:
        text: any name.
        longest: characters that the label may have.
    """
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"j-{label}".rstrip("-")
    if label != text or len(label) > longest:
        digest = hashlib.sha256(text.encode()).hexdigest()[:_HASH]
        label = f"{label[: longest - _HASH - 1].rstrip('-')}-{digest}"
    return label


def name_problems(manifest: dict[str, Any], longest: int) -> Iterator[tuple[str, str]]:
    """What is wrong with an object's name, with its place."""
    name = str((manifest.get("metadata") or {}).get("name", ""))
    if not LABEL.fullmatch(name):
        yield "metadata.name", "must be small letters, digits and -, beginning with a letter"
    if len(name) > longest:
        yield "metadata.name", f"has {len(name)} characters, and {longest} are allowed"
