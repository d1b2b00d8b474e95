#!/usr/bin/env bash
# Install adapter-bank into a virtual environment: one recipe for `make setup` and the Dockerfile.
#
#   deploy/install.sh runtime    what serving needs
#   deploy/install.sh dev        the same, and what tests, linters and type checks need
#   deploy/install.sh FILE.txt   nothing of ours: torch, and what a file of requirements pins (VENV names another environment)
#
#   PYTHON    interpreter for a new environment       default: the first of python3.12, python3.11, python3 that runs and fits
#   VENV      where the environment is                default: .venv
#   TORCH     cpu | cuda                              default: cuda where nvidia-smi lists a GPU, else cpu
#   FAISS     cpu | gpu                               default: cpu, on GPU machines too (see the extras in pyproject.toml)
#   EDITABLE  1: run from the sources, 0: copy them   default: 1
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
FAISS=${FAISS:-cpu}
EDITABLE=${EDITABLE:-1}
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
torch_pin=$(grep -E '^torch==' constraints.txt)

say() { echo "==> $*"; }
die() { echo "install.sh: $*" >&2; exit 1; }

# A name on PATH is not enough: a pyenv shim exists for every version and fails for those not selected; Debian may lack ensurepip.
fits() { "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; }

pick_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        fits "$PYTHON" || die "PYTHON=$PYTHON does not run, is not Python 3.11 or 3.12, or lacks the venv module"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.12 python3.11 python3; do
        if fits "$candidate"; then echo "$candidate"; return; fi
    done
    die "found no working Python 3.11 or 3.12 with the venv module (tried python3.12, python3.11, python3); name one: make setup PYTHON=/path/to/python3.12"
}

make_venv() {
    local python
    if fits "$VENV/bin/python"; then
        [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$(version_of "$VENV/bin/python")" ]] \
            || die "$VENV holds Python $(version_of "$VENV/bin/python") and PYTHON=$PYTHON is $(version_of "$PYTHON" || echo unusable); remove $VENV first"
        return
    fi
    [[ ! -e $VENV/bin ]] || die "$VENV has no working Python 3.11 or 3.12; remove it first"
    python=$(pick_python)
    say "creating $VENV with $python ($("$python" -V))"
    "$python" -m venv "$VENV"
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# "2.13.0+cpu", or "2.13.0" as on PyPI; empty where there is none
installed_torch() { "$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true; }

# First and pinned exactly: a looser range lets the resolver pull several GB of CUDA packages.
install_torch() {
    local present wanted
    wanted=${torch_pin#torch==}
    present=$(installed_torch)
    case $TORCH in
        cuda)
            if [[ $present == "$wanted" ]]; then return; fi
            if [[ $present == *+cpu ]]; then pip uninstall --yes --quiet torch; fi
            say "installing $torch_pin from PyPI, with its CUDA libraries"
            pip install --constraint constraints.txt "$torch_pin"
            ;;
        cpu)
            if [[ ${present%+*} == "$wanted" ]]; then return; fi
            say "installing the CPU build of $torch_pin from $TORCH_CPU_INDEX"
            # --no-deps: that index carries old copies of torch's dependencies; the next step takes the pinned ones from PyPI.
            if ! pip install --no-deps --timeout 5 --retries 1 --index-url "$TORCH_CPU_INDEX" "$torch_pin"; then
                say "NOTE: $TORCH_CPU_INDEX could not be reached or has no such build."
                say "NOTE: falling back to $torch_pin from the default package index (PyPI). For Linux that is normally the CUDA build:"
                say "NOTE: several GB, though it runs without a GPU. Interrupt now if you would rather retry later."
                pip install --constraint constraints.txt "$torch_pin"
            fi
            ;;
    esac
}

install_project() {
    local extras=$FAISS other=faiss-gpu target
    if [[ $FAISS == gpu ]]; then other=faiss-cpu; fi
    if [[ $profile == dev ]]; then extras+=,test; fi
    # Uninstalling one of the two after the other was installed would delete the module they share.
    if pip show --quiet "$other" 2>/dev/null; then pip uninstall --yes --quiet "$other" "faiss-$FAISS"; fi
    target=".[$extras]"
    say "installing adapter-bank$target"
    if [[ $EDITABLE == 1 ]]; then set -- --editable "$target"; else set -- "$target"; fi
    pip install --constraint constraints.txt "$@"
    pip check
}

install_requirements() {
    say "installing $profile"
    pip install --requirement "$profile"
    pip check
}

profile=${1:-}
[[ $profile == runtime || $profile == dev || ($profile == *.txt && -f $profile) ]] || die "usage: deploy/install.sh runtime|dev|FILE.txt"
if [[ -z ${TORCH:-} ]]; then
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then TORCH=cuda; else TORCH=cpu; fi
fi
[[ $TORCH == cpu || $TORCH == cuda ]] || die "TORCH=$TORCH: expected cpu or cuda"
[[ $FAISS == cpu || $FAISS == gpu ]] || die "FAISS=$FAISS: expected cpu or gpu"

make_venv
install_torch
if [[ $profile == *.txt ]]; then install_requirements; else install_project; fi
say "ready: $VENV ($profile, $("$VENV/bin/python" -V), torch $(installed_torch))"
