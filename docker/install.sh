#!/usr/bin/env bash
# Within a build: install what a target needs into the virtual environment, and leave nothing else behind.
#   install.sh cpu|cuda      the packages
#   install.sh package DIR   whisper-jobs, below DIR as it is to lie over the environment
set -euo pipefail

readonly VENV=/opt/whisper-jobs/venv
SITE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# A variable wins over the same setting of a pip.conf, whose paths are those of the machine that it came from.
export PIP_CONSTRAINT="/build/constraints.txt /build/docker/constraints.txt"
if [ -s /run/secrets/pip.conf ]; then export PIP_CONFIG_FILE=/run/secrets/pip.conf; fi
if [ -s /run/secrets/ca.pem ]; then export PIP_CERT=/run/secrets/ca.pem; fi
if [ -n "$(ls -A /wheels 2>/dev/null)" ]; then export PIP_FIND_LINKS=/wheels; fi

pip() { "$VENV/bin/python" -m pip "$@"; }
# A few files of torch's tests are for a later Python, which is no fault: hence `|| true`.
compile() { "$VENV/bin/python" -m compileall -qq -j 0 --invalidation-mode unchecked-hash "$@" || true; }

install_packages() {
  local target=$1 index=()
  # torch first and by itself: anything else would pull the newest build.
  if [ -n "${TORCH_INDEX:-}" ]; then index=(--index-url "$TORCH_INDEX"); fi
  if [ "$target" = cpu ]; then refuse_cuda "${index[@]}"; fi
  pip install --quiet "${index[@]}" "torch$(sed -n 's/^torch\(==.*\)/\1/p' constraints.txt)"
  python3 docker/requirements.py jobs exports s3 gcs demo >requirements.txt
  if [ "$target" = cpu ]; then without_triton; fi
  pip install --quiet --requirement requirements.txt dumb-init
}

# openai-whisper asks for Triton, a gigabyte that only NVIDIA GPUs have a use for: all else that it asks for is taken.
without_triton() {
  local asked
  pip install --quiet --no-deps "$(grep '^openai-whisper' requirements.txt)"
  asked=$("$VENV/bin/python" -c 'import importlib.metadata as m; print(*m.requires("openai-whisper"), sep="\n")')
  sed -i '/^openai-whisper/d' requirements.txt
  grep -v '^triton' <<<"$asked" >>requirements.txt
}

# Before anything of CUDA is fetched: gigabytes that a machine without a GPU has no use for.
refuse_cuda() {
  local found
  found=$(pip install --quiet --dry-run --no-deps --report - "$@" torch \
    | python3 -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])')
  if [ "${found#*+cpu}" = "$found" ]; then
    echo "install.sh: for the cpu image pip would take torch $found, which brings CUDA: give build.sh" \
      "--torch-index with the address of PyTorch's CPU index, or --wheels with a folder that has the CPU wheel" >&2
    exit 2
  fi
}

# What no program of ours reads: tests, headers, Ray for Java, what builds packages.
strip_packages() {
  cd "$SITE"
  rm -rf torch/test torch/include torch/share torch/bin/*Test torch/bin/test_* torch/bin/protoc* \
    ray/jars ray/cpp pyarrow/include pyarrow/tests pandas/tests numba/tests numba/cuda/tests plotly/labextension \
    pyarrow/*flight*
  find torch/lib -name '*.a' -delete
  find numpy sympy networkx -type d -name tests -prune -exec rm -rf {} +
  find . -name '*.pyx' -delete
  pip uninstall --quiet --yes setuptools pip
  rm -f "$VENV"/bin/pip* "$VENV"/bin/{activate.csh,activate.fish,Activate.ps1}
  cd /build
}

case $1 in
  cpu | cuda)
    install_packages "$1"
    strip_packages
    compile "$SITE"
    ;;
  package)
    pip wheel --quiet --no-deps --wheel-dir dist .
    pip install --quiet --no-deps --no-index --prefix "$2/venv" dist/*.whl
    compile "$2/venv"
    ;;
  *)
    echo "install.sh: cpu, cuda or package, not '$1'" >&2
    exit 2
    ;;
esac
