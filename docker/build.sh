#!/usr/bin/env bash
# Build the image with docker, buildah or podman. `docker/build.sh --help` says what may be given.
set -euo pipefail

usage() {
  cat <<'END'
usage: docker/build.sh [options]

  --target cpu|cuda     what to build (cpu)
  --tag NAME            name of the image (whisper-jobs:cpu or whisper-jobs:cuda)
  --base IMAGE          another base, with Python 3.11 or 3.12 on Debian; NAME@sha256:... pins its very bytes
  --torch-index URL     where torch comes from; for cpu, PyTorch's CPU index
  --wheels DIR          a folder of wheels that are taken before those of an index
  --pip-conf FILE       a pip.conf, as a build secret: no trace of it stays in the image
  --ca FILE             the certificate authority of the package index (PEM), as a build secret too
  --engine NAME         docker, buildah or podman; otherwise the first of them that is there and works
  --isolation NAME      of buildah and podman: oci, rootless or chroot
  --pull                look for a newer base; without it a base that is there already is taken
  --no-cache            build every step anew
  -h, --help            this
END
}

fail() {
  echo "build.sh: $1" >&2
  exit 2
}

target=cpu tag='' base='' torch_index='' wheels='' pip_conf='' ca='' engine='' isolation='' pull='' no_cache=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --pull) pull=1 && shift && continue ;;
    --no-cache) no_cache=1 && shift && continue ;;
    --target=* | --tag=* | --base=* | --torch-index=* | --wheels=* | --pip-conf=* | --ca=* | --engine=* | --isolation=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      ;;
    --target | --tag | --base | --torch-index | --wheels | --pip-conf | --ca | --engine | --isolation)
      [ $# -gt 1 ] || fail "$1 wants a value; see --help"
      ;;
    *) fail "there is no option '$1'; see --help" ;;
  esac
  [ -n "$2" ] || fail "$1 is empty; see --help"
  case $1 in
    --target) target=$2 ;;
    --tag) tag=$2 ;;
    --base) base=$2 ;;
    --torch-index) torch_index=$2 ;;
    --wheels) wheels=$2 ;;
    --pip-conf) pip_conf=$2 ;;
    --ca) ca=$2 ;;
    --engine) engine=$2 ;;
    --isolation) isolation=$2 ;;
  esac
  shift 2
done

case $target in cpu | cuda) ;; *) fail "--target is cpu or cuda, not '$target'" ;; esac
case $engine in
  '' | docker | buildah | podman) ;;
  *) fail "--engine is docker, buildah or podman, not '$engine'" ;;
esac
[ -z "$pip_conf" ] || [ -r "$pip_conf" ] || fail "--pip-conf $pip_conf: there is no such file, or it cannot be read"
[ -z "$ca" ] || [ -r "$ca" ] || fail "--ca $ca: there is no such file, or it cannot be read"
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "--wheels $wheels: there is no such folder"
if [ -n "$pip_conf" ] && [ -z "$ca" ] && grep -Eq '^[[:space:]]*cert[[:space:]]*=' "$pip_conf"; then
  fail "$pip_conf names a certificate authority (cert), whose file is not there in the build: give it with --ca too"
fi

# Docker's client may be there without a daemon; the others have none.
works() {
  if [ "$1" = docker ]; then docker version >/dev/null 2>&1; else "$1" --version >/dev/null 2>&1; fi
}
if [ -z "$engine" ]; then
  for one in docker buildah podman; do
    if works "$one"; then engine=$one && break; fi
  done
  [ -n "$engine" ] || fail "none of docker, buildah and podman is there and works; install one, or start Docker"
elif ! works "$engine"; then
  fail "$engine is not there, or does not work: \`$engine version\` says why"
fi

root=$(cd "$(dirname "$0")/.." && pwd)
absolute() { (cd "$(dirname "$1")" && printf '%s/%s' "$(pwd)" "$(basename "$1")"); }
tag=${tag:-whisper-jobs:$target}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml" | head -n 1)
# The moment of the commit: two builds of one commit differ in nothing, and its layers are used again.
revision=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
created=$(git -C "$root" log -1 --format=%ct 2>/dev/null || date +%s)
created=$(date --utc --date="@${SOURCE_DATE_EPOCH:-$created}" +%Y-%m-%dT%H:%M:%SZ)
if [ -n "$(git -C "$root" status --porcelain 2>/dev/null)" ]; then revision=$revision-changed; fi

arguments=(--file "$root/docker/Dockerfile" --target "$target" --tag "$tag"
  --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "CREATED=$created")
if [ -n "$base" ]; then arguments+=(--build-arg "BASE=$base"); fi
if [ -n "$torch_index" ]; then arguments+=(--build-arg "TORCH_INDEX=$torch_index"); fi
if [ -n "$wheels" ]; then arguments+=(--build-context "wheels=$(absolute "$wheels")"); fi
if [ -n "$pip_conf" ]; then arguments+=(--secret "id=pip_conf,src=$(absolute "$pip_conf")"); fi
if [ -n "$ca" ]; then arguments+=(--secret "id=ca,src=$(absolute "$ca")"); fi
if [ -n "$no_cache" ]; then arguments+=(--no-cache); fi

case $engine in
  docker)
    if [ -n "$pull" ]; then arguments+=(--pull); fi
    DOCKER_BUILDKIT=1 docker build "${arguments[@]}" "$root"
    ;;
  buildah | podman)
    # The format of docker: OCI's own has no health check.
    arguments+=(--format docker --layers)
    if [ -n "$pull" ]; then arguments+=(--pull=always); else arguments+=(--pull=false); fi
    if [ -n "$isolation" ]; then arguments+=(--isolation "$isolation"); fi
    "$engine" build "${arguments[@]}" "$root"
    ;;
esac
