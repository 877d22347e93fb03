"""Manifests validated as a cluster would: built-in kinds by the schemas of Kubernetes, Ray's by its CRDs."""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import celpy.adapter
import jsonschema
import kubernetes_validate
import pytest
import yaml

KUBERNETES = "1.37"
"""Whose schemas are taken; 1.29 is tried too, the oldest that KubeRay 1.7 knows."""

OLD_KUBERNETES = "1.29"

CRDS = "KUBERAY_CRDS"
"""The variable that names the folder with KubeRay's CRDs."""

HOW_TO_GET_THEM = (
    f"{CRDS} names no folder with KubeRay's CRDs: take rayclusters.yaml, rayjobs.yaml and raycronjobs.yaml from "
    "ray-operator/config/crd/bases of KubeRay v1.7.0 (as ray.io_rayclusters.yaml, ...), put them into one folder and "
    f"set {CRDS} to it"
)
GROUP = "ray.io"

Manifest = dict[str, Any]


def problems(manifest: Manifest) -> list[str]:
    """What a cluster would refuse of a manifest: unknown fields, wrong types, missing ones, broken rules."""
    if manifest["apiVersion"].startswith(f"{GROUP}/"):
        return _custom_problems(manifest)
    found = []
    for version in (KUBERNETES, OLD_KUBERNETES):
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {'.'.join(map(str, error.path))}: {error.message}")
    return found


def has_crds() -> bool:
    """Whether the CRDs are at hand."""
    return Path(os.environ.get(CRDS, "/nowhere")).is_dir()


needs_crds = pytest.mark.skipif(not has_crds(), reason=HOW_TO_GET_THEM)


def _custom_problems(manifest: Manifest) -> list[str]:
    schema = _schema(manifest["kind"], manifest["apiVersion"].split("/")[1])
    validator = jsonschema.Draft202012Validator(_strict(manifest["kind"], manifest["apiVersion"].split("/")[1]))
    found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]
    return found or [*_rule_problems(schema, manifest, manifest["kind"])]


@cache
def _crd(kind: str) -> Manifest:
    for path in sorted(Path(os.environ[CRDS]).glob("*.yaml")):
        crd = yaml.load(path.read_text(), yaml.CSafeLoader)  # in C: ten times as fast
        if crd["spec"]["names"]["kind"] == kind:
            return dict(crd)
    raise AssertionError(f"{os.environ[CRDS]} has no CRD of {kind}")


@cache
def _schema(kind: str, version: str) -> Manifest:
    served = {one["name"]: one for one in _crd(kind)["spec"]["versions"] if one["served"]}
    return dict(served[version]["schema"]["openAPIV3Schema"])


@cache
def _strict(kind: str, version: str) -> Manifest:
    """The schema as JSON Schema, in which an unknown field is an error: a cluster would drop it without a word."""
    schema = copy.deepcopy(_schema(kind, version))
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, the same for every kind
    _make_strict(schema)
    return schema


def _make_strict(schema: Manifest) -> None:
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.pop("nullable", False) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    if schema.get("format") in ("int32", "int64"):
        bits = int(schema["format"][3:]) - 1
        schema.setdefault("minimum", -(2**bits))
        schema.setdefault("maximum", 2**bits - 1)
    for inner in schema.get("properties", {}).values():
        _make_strict(inner)
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            _make_strict(schema[name])


def _rule_problems(schema: Manifest, value: Any, place: str) -> list[str]:
    """The CRD's rules in CEL, and its lists whose entries have keys. Rules on changes concern none that is new."""
    found = []
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            found.append(f"{place}: {rule.get('message', rule['rule'])}")
    if isinstance(value, dict):
        for name, inner in value.items():
            known = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(known, dict):
                found += _rule_problems(known, inner, f"{place}.{name}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        keys = schema.get("x-kubernetes-list-map-keys", [])
        defaults = {key: schema["items"]["properties"][key].get("default") for key in keys}
        seen = [tuple(entry.get(key, defaults[key]) for key in keys) for entry in value] if keys else []
        if len(seen) != len(set(seen)):
            found.append(f"{place}: two entries with the same {', '.join(keys)}")
        for index, inner in enumerate(value):
            found += _rule_problems(schema["items"], inner, f"{place}[{index}]")
    return found


@cache
def _program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _holds(rule: str, value: Any) -> bool:
    return bool(_program(rule).evaluate({"self": celpy.adapter.json_to_cel(value)}))
