"""What manifests are here, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Manifest = dict[str, Any]
"""An object of Kubernetes, or a part of one, as YAML has it."""

Problems = Iterator[tuple[str, str]]
"""Places in a manifest, and what is wrong there."""
