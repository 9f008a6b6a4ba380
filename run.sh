#!/usr/bin/env bash
# The whole pipeline, a line per stage.
#
#   bash run.sh demo [MODEL] [--option value ...]     the embedded benchmark, offline, on a CPU
#   bash run.sh tofu|lume MODEL [--option value ...]  a model of the table, a folder in Hugging Face
#                                                     layout, or hf:OWNER/NAME[@REVISION]
#   bash run.sh unlearn MODEL FORGET [RETAIN] [--unseen FILE] [--teach] [--out DIR] [--attack]
#                                                     rows of your own, JSON lines, in your own model;
#                                                     status 3 where they are not forgotten
#   bash run.sh attack RUN [STAGE ...]                what of it stays forgotten under attack
#   bash run.sh sweep BENCHMARK [MODEL] [--option ..] every method over learning rates and seeds
#   bash run.sh figures [FOLDER ...]                  figures of the sweeps and runs stored there
#   bash run.sh test                                  the test suite
#
# Options are those of `python -m pipeline original --help`; --methods fo so simu and --objectives
# graddiff to run others or several; --seeds N to run seeds 0 to N-1; --dry-run to see the downloads,
# the stages, memory and durations only. Of a sweep, those of `python -m pipeline sweep --help`. A
# finished stage is skipped (--force: made again), a killed one goes on from where it was.
set -euo pipefail
here="$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")" && pwd)"

trap 'echo "error: stopped before anything was done" >&2; exit 130' INT
fail() { echo "error: $*" >&2; exit 2; }
die() { fail "$*; see: bash run.sh --help"; }
[[ -d "$PWD" ]] || fail "this folder is gone; cd to another"

# The active Python if it has what is needed, else a .venv made here once.
has() { # has PYTHON FILE [PACKAGE ...]: those packages, or all of FILE, as new as FILE says
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
set_up() { # set_up [PACKAGE ...] for a run, set_up all for the tests
    local venv="$here/.venv" wanted=(requirements.txt torch sentencepiece safetensors tqdm "$@")
    [[ "${1:-}" != all ]] || wanted=(requirements-dev.txt)
    python=python3
    has "$python" "${wanted[@]}" && return
    python="$venv/bin/python"
    [[ ! -e "$venv/unfinished" ]] && has "$python" "${wanted[@]}" && return
    ! kill -0 "$(cat "$venv/unfinished" 2>/dev/null)" 2>/dev/null ||
        fail "process $(cat "$venv/unfinished") is making $venv; wait for it, or delete that folder"
    local packages="the packages of ${wanted[0]}" why="no Python environment: $here needs"
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
        "$python" -I -m pip install --disable-pip-version-check --no-compile \
            -r "$here/${wanted[0]}" >&2 ||
        fail "$why $packages, and pip could not install them (see above)"
    [[ ! -e "$venv/unfinished" ]] || mv "$venv/unfinished" "$venv/finished"
}

benchmark="${1:-}"
case "$benchmark" in
test)
    set_up all
    cd "$here"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the models are too small to share
    [[ $# -gt 1 ]] || exec "$python" tests/all.py
    exec "$python" -m pytest -q "${@:2}" ;;
attack)
    [[ $# -ge 2 ]] || die "attack: name the folder of a run"
    set_up
    exec "$python" "$here/pipeline" attack "${@:2}" ;;
figures)
    set_up  # figures.py says so where matplotlib is missing
    exec "$python" "$here/pipeline" figures all "${@:2}" ;;
sweep)
    [[ " demo tofu lume " == *" ${2:-none} "* ]] || die "sweep: name demo, tofu or lume"
    benchmark="$2" model=tiny-llama short=()
    shift 2
    if [[ "${1:---}" != --* ]]; then model="$1"; shift; fi
    [[ "$benchmark" != demo ]] || short=(--epochs 10)  # so that it ends in half an hour
    case "$model" in *llama) set_up ;; *) set_up tokenizers ;; esac
    exec "$python" "$here/pipeline" sweep "$benchmark" "$model" ${short[@]+"${short[@]}"} "$@" ;;
demo)
    model=tiny-llama
    shift
    if [[ "${1:---}" != --* ]]; then model="$1"; shift; fi ;;
tofu | lume)
    [[ "${2:---}" != --* ]] ||
        die "$1: name a model: llama2-7b, olmo-1b, tiny-llama, tiny-olmo, a folder, or hf:OWNER/NAME"
    model="$2"
    shift 2 ;;
unlearn)
    case " ${*:2} " in *" --help "* | *" -h "*) set_up; exec "$python" "$here/pipeline" unlearn --help ;; esac
    [[ $# -ge 3 && "$2" != --* && "$3" != --* ]] ||
        die "unlearn: name a model and a file of rows to forget, and a file of rows to keep"
    benchmark=rows model="$2" own=(--forget "$3")
    shift 3
    if [[ "${1:---}" != --* ]]; then own+=(--retain "$1"); shift; fi
    set -- "${own[@]}" --name model "$@" ;;
-h | --help) sed -n '2,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
*) die "'$benchmark' is not something to run: name demo, tofu, lume, unlearn, attack, sweep, figures or test" ;;
esac

needs=()
case "$model" in tiny-llama | llama2-7b) ;; *) needs+=(tokenizers) ;; esac
[[ "$benchmark" == demo || "$benchmark" == rows && -d "$model" ||
    -n "${SIMU_DATA:-}" && "$model" != hf:* && ("$model" == tiny* ||
    -d "$model") ]] || needs+=(huggingface_hub)
set_up ${needs[@]+"${needs[@]}"}

# These are needed here; every other option goes to the stages as it is.
run="" attack="" also="" seeds=1 methods=() objectives=() options=() force=() dry=""
while [[ $# -gt 0 ]]; do
    case "$1" in
    -h | --help) exec "$python" "$here/pipeline" original --help ;;
    --out=* | --seeds=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --out) [[ -n "${2:-}" ]] || die "--out: name a folder"; run="$2"; shift 2 ;;
    --seeds) [[ "${2:-}" =~ ^[1-9][0-9]{0,3}$ ]] || die "--seeds must be 1 to 9999"
        seeds="$2"; shift 2 ;;
    --methods) shift; while [[ "${1:---}" != --* ]]; do methods+=("$1"); shift; done ;;
    --objectives) shift; while [[ "${1:---}" != --* ]]; do objectives+=("$1"); shift; done ;;
    --attack) attack=yes; shift ;;
    --dry-run) dry=echo; shift ;;
    --force) force=(--force); shift ;;
    *) options+=("$1"); shift ;;
    esac
done
if [[ "$benchmark" == rows ]]; then  # one method, and the recipe's own objective
    methods=("${methods[@]:0:1}") objectives=("${objectives[@]:0:1}")
    [[ -n "${methods[0]:-}" ]] || methods=(simu)
else
    [[ ${#methods[@]} -gt 0 ]] || methods=(fo so simu)
    [[ ${#objectives[@]} -gt 0 || "$benchmark" != demo ]] || also=stranger  # beside the paper's
    [[ ${#objectives[@]} -gt 0 ]] || objectives=(graddiff)
fi
if [[ -z "$run" ]]; then
    label="${model#hf:}" && label="${label%/}"
    case "$model" in hf:*) label="${label//\//--}" ;; *) label="${label##*/}" ;; esac
    run="$here/runs/$benchmark-$label"
fi
[[ "$run" != -* ]] || run="./$run"  # or it would be read as an option
# Whole, so that RUN-seed1 stands beside it also for --out DIR/ or --out .
whole="$("$python" -c 'import os, sys
path = os.path.expanduser(sys.argv[1])
path[:1] == "~" and sys.exit(1)
sys.stdout.buffer.write(os.fsencode(os.path.abspath(path)))' "$run" 2>/dev/null)" || die "--out $run: no such user"
run="$whole"
[[ $seeds -eq 1 || " ${options[*]-}" != *" --seed"[\ =]* ]] ||
    fail "--seeds $seeds chooses the seeds 0 to $((seeds - 1)); drop --seed"

# A stage is a process, so that its memory is given back; those of a tiny model are one for all.
each_stage() {
    if [[ $tiny && -z $dry ]]; then queue+=(${queue[0]:+--then} "$@"); else $dry "${stage[@]}" "$@"; fi
}
tiny="" queue=() stage=("$python" "$here/pipeline")
[[ ! "$model" =~ ^tiny-(llama|olmo)$ ]] || tiny=yes
pipeline() { # pipeline RUN [--seed K]
    local at method objective each=()
    at=("$benchmark" "$model" ${options[@]+"${options[@]}"} ${force[@]+"${force[@]}"} --out "$@")
    [[ -z $dry ]] || { "${stage[@]}" files "${at[@]}"; echo; "${stage[@]}" plan "${at[@]}"; echo; }
    each_stage original "${at[@]}"
    each_stage check "$1"
    each_stage attribute "${at[@]}"
    each_stage mask "${at[@]}"
    for method in "${methods[@]}"; do
        for objective in "${objectives[@]:-}"; do
            each+=("$method${objective:+:$objective}")
        done
    done
    [[ -z "$also" ]] || each+=("simu:$also")
    if [[ $tiny ]]; then  # at once; of large models, one at a time fits
        each_stage unlearn "${at[@]}" --each "${each[@]}"
    else
        for method in "${each[@]}"; do
            objective="${method#"${method%%:*}"}"
            each_stage unlearn "${at[@]}" --method "${method%%:*}" \
                ${objective:+--objective "${objective#:}"}
        done
    fi
    each_stage evaluate "$1" ${force[@]+"${force[@]}"}
}
trap 'exit 130' INT  # the stage has said so
{ # read whole before it starts, so that editing this file does not derail a run
    pipeline "$run"
    for ((k = 1; k < seeds; k++)); do pipeline "$run-seed$k" --seed "$k"; done
    each_stage report "$run"
    [[ -z "$attack" ]] || each_stage attack "$run"
    [[ "$benchmark" != rows ]] || each_stage verdict "$run"
    [[ -z "${queue[0]:-}" ]] || "${stage[@]}" "${queue[@]}"
    exit
}
