"""Manifests for Kubernetes with KubeRay: made from a spec, and checked without a cluster.

names.py    names that Kubernetes takes
options.py  what a manifest needs beside the spec, and all faults of it at once; schedule.py reads schedules
sizes.py    pods and their resources from a spec
pods.py     pod templates: security, volumes, probes, placement
cluster.py  the RayCluster
render.py   a spec as a RayJob, or as a CronJob that submits it
rules.py    what no schema says: raycluster_rules.py, rayjob_rules.py, standard.py (every pod)
generated.py  the files under k8s/ that are made from here
"""

from service.kubernetes.options import Mount, RenderOptions
from service.kubernetes.render import Rendered, render
from service.kubernetes.rules import check, unknown_kinds

__all__ = ["Mount", "RenderOptions", "Rendered", "check", "render", "unknown_kinds"]
