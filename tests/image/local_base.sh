#!/usr/bin/env bash
# Where no registry is in reach: make a base of Debian's packages with the Python that it has, under the name of the true one.
#   local_base.sh IMAGE      wants root, debootstrap and podman
set -euo pipefail

image=$1
place=$(mktemp -d /var/tmp/whisper-jobs-base.XXXXXX)
trap 'rm -rf "$place"' EXIT

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$place/root" >"$place/log" 2>&1 \
  || { tail -n 5 "$place/log" >&2 && exit 1; }
rm -rf "$place"/root/var/cache/apt/* "$place"/root/var/lib/apt/lists/* "$place"/root/var/log/*
tar --create --directory "$place/root" . \
  | podman import --quiet --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin' --change 'CMD ["python3"]' - "$image"
