#!/bin/sh
# Installs torch into the environment of the given python, unless it can import one already.
#
#   scripts/install_torch.sh .venv/bin/python
#
# Plain `torch` from PyPI on Linux brings several GB of CUDA packages, so a CPU build is looked for first:
#   1. TORCH_INDEX, where it is set (for example https://download.pytorch.org/whl/cu126 for CUDA);
#   2. the sources pip is configured with (PIP_INDEX_URL, PIP_FIND_LINKS, ...), where they have a +cpu build;
#   3. pytorch.org's index of CPU builds;
#   4. whatever the configured sources call torch, with a warning.
set -eu
python=$1
version=${TORCH_VERSION:-2.13.0}

"$python" -c 'import torch' 2>/dev/null && exit 0

install() { "$python" -m pip install --disable-pip-version-check "$@"; }

if [ -n "${TORCH_INDEX:-}" ]; then
    install --index-url "$TORCH_INDEX" "torch==$version"
    exit
fi
if [ "$(uname -s)" = Darwin ]; then # PyPI's macOS build has no CUDA in it
    install "torch==$version"
    exit
fi
echo "Looking for a CPU build of torch $version ..."
install "torch==$version+cpu" 2>/dev/null && exit
install --index-url https://download.pytorch.org/whl/cpu --timeout 10 --retries 0 "torch==$version" && exit
echo "No CPU build of torch was found; installing the plain one, which may bring CUDA packages of several GB." >&2
install "torch==$version"
