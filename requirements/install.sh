#!/usr/bin/env bash
# Install the CPU build and this package into a virtual environment: install.sh FOLDER
set -euo pipefail

venv="$1"
here="$(cd "$(dirname "$0")" && pwd)"
lock="$here/cpu.lock"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python; do
        # A launcher may be on PATH for a version that is not installed, so ask it to run.
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "sjd-vllm's lock file is for Python 3.11, which is not on PATH; set PYTHON to it." >&2
    return 1
}

if [ ! -x "$venv/bin/python" ]; then
    python="$(find_python)"
    "$python" -m venv "$venv"
fi
# Twice quiet: errors alone are told.
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)

torch="$(grep '^torch==' "$lock")"
echo "sjd-vllm: installing $torch into $venv"
# The package index has torch's CUDA build alone under this version; the CPU build may lie in a folder that pip was
# told about, and else stands on PyTorch's own index.
"${pip[@]}" install --no-deps "$torch" 2>/dev/null ||
    "${pip[@]}" install --no-deps "$torch" --index-url https://download.pytorch.org/whl/cpu
echo "sjd-vllm: installing the other $(grep -c '==' "$lock") packages of $(basename "$lock"); this takes some minutes"
"${pip[@]}" install --no-deps -r "$lock"
"${pip[@]}" install --no-deps --upgrade --target "$venv/triton" -r "$here/kernels.lock"
echo "sjd-vllm: installing the package"
"${pip[@]}" install --no-deps --no-build-isolation -e "$here/.."
"$venv/bin/python" "$here/vllm_metadata.py"
