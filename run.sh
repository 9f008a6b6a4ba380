#!/usr/bin/env bash
# Find a Python, or make one, and run what is asked for.
#
#   bash run.sh demo [MODEL] [--option value ...]     the embedded benchmark, offline, on a CPU
#   bash run.sh tofu|lume MODEL [--option value ...]  a model of the table, a folder in Hugging Face
#                                                     layout, or hf:OWNER/NAME[@REVISION]
#   bash run.sh unlearn MODEL FORGET [RETAIN] [--unseen FILE] [--teach] [--out DIR] [--attack]
#                                                     your rows, JSON lines, in your model; status 3
#                                                     if not forgotten, or others are lost
#   bash run.sh attack RUN [STAGE ...]                what of it stays forgotten under attack
#   bash run.sh depth RUN [STAGE ...]                 how deep forgetting goes
#   bash run.sh sweep BENCHMARK [MODEL] [--option ..] every method over learning rates and seeds
#   bash run.sh figures [FOLDER ...]                  figures of the sweeps and runs stored there
#   bash run.sh test                                  the test suite
#
# Each has a --help. Of the first three: --methods fo so simu and --objectives graddiff to run
# others or several; --seeds N to run seeds 0 to N-1; --dry-run to see the downloads, the stages and
# the memory only. A finished stage is skipped (--force: run again), a killed one goes on.
set -euo pipefail
here="$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")" && pwd)"
export MALLOC_MMAP_THRESHOLD_=4194304  # glibc: freed blocks of 4 MB go back; a fifth of the peak

trap 'echo "error: stopped before anything was done" >&2; exit 130' INT
fail() { echo "error: $*" >&2; exit 2; }
[[ -d "$PWD" ]] || fail "this folder is gone; cd to another"

has() { # has PYTHON FILE [PACKAGE ...]: those packages, or all of FILE, as new as FILE says?
    # Nothing is imported from the caller's folder, which -c, but for -I, puts first on the path.
    "$1" -c 'import sys; sys.path = [p for p in sys.path if p]
import re, importlib.metadata as installed
text = "".join(open(f).read() for f in sys.argv[1:3])
least = dict(re.findall("^([a-z][^>=\n]*)[>=]=(.*)", text, re.M), torch="2.5")
number = lambda version: [int(n) for n in re.findall("[0-9]+", version)]
sys.exit(sys.version_info < (3, 10) or any(
    number(installed.version(p)) < number(least[p]) for p in sys.argv[3:] or least))' \
        "$here/requirements.txt" "$here/$2" "${@:3}"
} 2>/dev/null

set_up() { # the active Python if it has what is needed, else .venv: set_up FILE [PACKAGE ...]
    local venv="$here/.venv" packages="the packages of $1" why="no Python environment: $here needs"
    python=python3
    has "$python" "$@" && return
    python="$venv/bin/python"
    [[ ! -e "$venv/unfinished" ]] && has "$python" "$@" && return
    ! kill -0 "$(cat "$venv/unfinished" 2>/dev/null)" 2>/dev/null ||
        fail "process $(cat "$venv/unfinished") is making $venv; wait for it, or delete that folder"
    python3 -I -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$why python3 >= 3.10 with venv, or one that has $packages"
    echo "installing $packages into $venv, once (torch alone is 200 MB to 3 GB)" >&2
    # An unfinished one was cut off, and what pip left there may be in pieces. One that says neither
    # is the user's own: added to, never removed.
    [[ ! -e "$venv/unfinished" ]] || rm -rf "$venv"
    [[ -d "$venv" ]] || { mkdir "$venv" && touch "$venv/finished"; } || fail "cannot make $venv"
    [[ ! -e "$venv/finished" ]] || mv "$venv/finished" "$venv/unfinished"
    [[ ! -e "$venv/unfinished" ]] || echo $$ >"$venv/unfinished"
    python3 -I -m venv "$venv" >&2 &&
        "$python" -I -m pip install --disable-pip-version-check --no-compile -r "$here/$1" >&2 ||
        fail "$why $packages, and pip could not install them (see above)"
    [[ ! -e "$venv/unfinished" ]] || mv "$venv/unfinished" "$venv/finished"
}
least=(requirements.txt torch sentencepiece safetensors tqdm)

case "${1:-}" in
demo | tofu | lume | unlearn)
    [[ "$1" == demo && "${2:---}" =~ ^(-.*|tiny-llama)$ ]] || least+=(tokenizers)
    set_up "${least[@]}"
    exec "$python" "$here/pipeline" run "$@" ;;
attack | sweep | depth)
    set_up "${least[@]}"
    exec "$python" "$here/pipeline" "$@" ;;
figures)
    set_up "${least[@]}"  # figures.py says so where matplotlib is missing
    exec "$python" "$here/pipeline" figures "${@:2}" ;;
test)
    set_up requirements-dev.txt
    cd "$here"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the models are too small to share
    [[ $# -gt 1 ]] || exec "$python" tests/all.py
    exec "$python" -m pytest -q "${@:2}" ;;
-h | --help) sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
*) fail "'${1:-}' is not something to run; see: bash run.sh --help" ;;
esac
