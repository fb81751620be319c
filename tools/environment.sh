# shellcheck shell=bash
# Sourced by train.sh, test.sh and .ci/run: makes the virtual environment, or finds it ready in a few milliseconds.
#
#   environment run    what training needs
#   environment dev    that, and the tools and tests
#
# Leaves the environment's Python in $python and the repository's folder in $root. Set from outside:
#   VENV=folder      another place than .venv beside this repository
#   PYTHON=command   the Python to build it with (3.11 or newer)
#   TORCH=cuda|cpu   the build of torch, where it should not follow from whether this machine has an NVIDIA GPU

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
python=$venv/bin/python

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11; do
        # A name on PATH may be a shim without a Python behind it: only an answer counts.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        if [ -n "${PYTHON:-}" ]; then
            say "PYTHON=$PYTHON: expected a Python 3.11 or newer that starts."
            return 1
        fi
    done
    say "Found no Python 3.11 or newer (tried python3, python3.14 … python3.11)."
    say "Install one and run this again: 'sudo apt install python3 python3-venv' (Debian 12, Ubuntu 24.04 and newer),"
    say "'sudo dnf install python3', 'brew install python', or https://www.python.org/downloads/."
    say "If you have one elsewhere: PYTHON=/path/to/python3 $0"
    return 1
}

has_nvidia_gpu() {
    local device
    for device in /dev/nvidia[0-9]*; do
        [ -e "$device" ] && return 0
    done
    nvidia-smi -L >/dev/null 2>&1  # WSL has no device file
}

# PyPI's torch for Linux is the CUDA build, some gigabytes of it. torch's own CPU index has the small one.
cpu_index=https://download.pytorch.org/whl/cpu

cpu_index_answers() {
    "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=4)' \
        "$cpu_index/torch/" >/dev/null 2>&1
}

would_install_cuda() {
    "$python" -m pip install --quiet --dry-run --ignore-installed --report - -c "$root/constraints.txt" torch \
        2>/dev/null | grep -q '"name": *"nvidia'
}

make_venv() {
    local base
    if "$python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A -- "$venv")" ]; then
        say "$venv: expected a virtual environment, an empty folder or nothing. Give another with VENV=…"
        return 1
    fi
    base=$(find_python) || return 1
    say "Making a virtual environment in $venv with $("$base" --version)."
    if ! "$base" -m venv --clear -- "$venv"; then
        say "This Python cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv"
        return 1
    fi
}

environment() {
    local wanted=$1 key extras torch=${TORCH:-} from_index="" quiet=""
    # What was installed, for which files, where: an edited pyproject or a moved clone installs again.
    key=$(cat -- "$root/pyproject.toml" "$root/constraints.txt" <(printf '%s' "$root $torch") | cksum)
    local stamp
    for stamp in "$venv/.installed-dev" "$venv/.installed-$wanted"; do
        if [ -e "$stamp" ] && [ "$(cat -- "$stamp")" = "$key" ] && "$python" -c '' 2>/dev/null; then
            return
        fi
    done

    make_venv || return 1
    if [ -z "$torch" ]; then
        torch=cpu
        if has_nvidia_gpu; then torch=cuda; fi
    fi
    extras=$torch
    [ "$torch" = cuda ] && extras=$torch,quantization  # what dev needs on every card under 80 GB
    [ "$wanted" = dev ] && extras=$extras,dev
    if [ "$torch" = cpu ] && [ "$(uname -s)" = Linux ]; then
        if cpu_index_answers; then
            from_index=$cpu_index
        elif would_install_cuda; then
            say "Note: $cpu_index does not answer, and the index in use has only torch's CUDA build: a few GB to come."
        fi
    fi
    say "Installing simpletuner[$extras] into $venv. The first time this takes a few minutes."
    [ -t 2 ] || quiet=--quiet
    "$python" -m pip install ${quiet:+"$quiet"} --disable-pip-version-check -c "$root/constraints.txt" \
        ${from_index:+--extra-index-url "$from_index"} -e "${root}[$extras]" >&2 || {
        say "The installation did not finish. What pip says is above; the same command picks it up again."
        return 1
    }
    # DeepSpeed comes as source alone; where it cannot be built or had, all other tests run.
    if [ "$wanted" = dev ]; then
        "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" \
            ${from_index:+--extra-index-url "$from_index"} -e "${root}[deepspeed]" >&2 ||
            say "DeepSpeed could not be installed; its tests will say so."
    fi
    printf '%s\n' "$key" >"$venv/.installed-$wanted"
}
