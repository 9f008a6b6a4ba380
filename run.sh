#!/usr/bin/env bash
# The whole pipeline, a line per stage.
#
#   bash run.sh demo [MODEL] [--option value ...]     the embedded benchmark, offline, on a CPU
#   bash run.sh tofu|lume MODEL [--option value ...]  llama2-7b, olmo-1b, tiny-llama or tiny-olmo
#   bash run.sh attack RUN [STAGE ...] [--requests K] what of it stays forgotten under attack
#   bash run.sh sweep BENCHMARK [MODEL] [--option ..] every method over learning rates and seeds
#   bash run.sh figures [FOLDER ...]                  figures of the sweeps and runs stored there
#   bash run.sh test                                  the test suite
#
# Options are those of `python simu.py original --help`, --seeds N to run seeds 0 to N-1, and
# --dry-run to see the downloads, the stages and the memory plan only; of a sweep, those of
# `python simu.py sweep --help`. A finished stage is skipped (--force: made again), a killed one
# goes on from where it was.
set -euo pipefail
here="$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")" && pwd)"

die() { echo "error: $*; see: bash run.sh --help" >&2; exit 2; }

# The active Python if it has torch 2.5 or later and the packages named, else a .venv made here once.
has() {
    "$1" -c 'import sys, importlib.metadata as m, importlib.util as u
sys.exit(sys.version_info < (3, 10) or any(u.find_spec(x) is None for x in sys.argv[1:])
         or tuple(map(int, m.version("torch").split(".")[:2])) < (2, 5))' "${@:2}"
} 2>/dev/null
set_up() {
    local packages=(torch sentencepiece safetensors tqdm "$@")
    python=python3
    has "$python" "${packages[@]}" && return
    python="$here/.venv/bin/python"
    has "$python" "${packages[@]}" && return
    echo "making .venv from requirements.txt (once; torch is large)" >&2
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' &&
        python3 -m venv "$here/.venv" &&
        "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt" ||
        { echo "error: no Python environment: $here needs python3 >= 3.10 with venv, and the" \
            "packages of requirements.txt; install them and run again" >&2; exit 2; }
}

benchmark="${1:-}"
case "$benchmark" in
test)
    set_up pytest tokenizers
    cd "$here"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the models are too small to share
    [[ $# -gt 1 ]] || exec "$python" tests/all.py
    exec "$python" -m pytest -q "${@:2}" ;;
attack)
    [[ $# -ge 2 ]] || die "attack: name the folder of a run"
    set_up
    exec "$python" "$here/attack.py" "${@:2}" ;;
figures)
    set_up  # figures.py says so where matplotlib is missing
    exec "$python" "$here/figures.py" all "${@:2}" ;;
sweep)
    [[ " demo tofu lume " == *" ${2:-none} "* ]] || die "sweep: name demo, tofu or lume"
    benchmark="$2" model=tiny-llama short=()
    shift 2
    if [[ "${1:---}" != --* ]]; then model="$1"; shift; fi
    [[ "$benchmark" != demo ]] || short=(--epochs 10)  # so that it ends in half an hour
    case "$model" in *olmo*) set_up tokenizers ;; *) set_up ;; esac
    exec "$python" "$here/simu.py" sweep "$benchmark" "$model" ${short[@]+"${short[@]}"} "$@" ;;
demo)
    model=tiny-llama
    shift
    if [[ "${1:---}" != --* ]]; then model="$1"; shift; fi ;;
tofu | lume)
    [[ "${2:---}" != --* ]] || die "$1: name a model: llama2-7b, olmo-1b, tiny-llama or tiny-olmo"
    model="$2"
    shift 2 ;;
-h | --help) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
*) die "'$benchmark' is not something to run: name demo, tofu, lume, attack, sweep, figures or test" ;;
esac

needs=()
case "$model" in *olmo*) needs+=(tokenizers) ;; esac
[[ "$benchmark" == demo || -n "${SIMU_DATA:-}" && "$model" == tiny* ]] || needs+=(huggingface_hub)
set_up ${needs[@]+"${needs[@]}"}

# These are needed here; every other option goes to simu.py as it is.
run="$here/runs/$benchmark-$model" seeds=1 options=() force=() dry=""
while [[ $# -gt 0 ]]; do
    case "$1" in
    -h | --help) exec "$python" "$here/simu.py" original --help ;;
    --out=* | --seeds=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --out) [[ -n "${2:-}" ]] || die "--out: name a folder"; run="$2"; shift 2 ;;
    --seeds) [[ "${2:-}" =~ ^[1-9][0-9]{0,3}$ ]] || die "--seeds must be 1 to 9999"
        seeds="$2"; shift 2 ;;
    --dry-run) dry=echo; shift ;;
    --force) force=(--force); shift ;;
    *) options+=("$1"); shift ;;
    esac
done

[[ "$run" != -* ]] || run="./$run"  # or it would be read as an option
[[ $seeds -eq 1 || " ${options[*]-}" != *" --seed"[\ =]* ]] ||
    { echo "error: --seeds $seeds chooses the seeds 0 to $((seeds - 1)); drop --seed" >&2; exit 2; }

pipeline() { # pipeline RUN [--seed K]
    local simu=("$python" "$here/simu.py") at
    at=("$benchmark" "$model" ${options[@]+"${options[@]}"} ${force[@]+"${force[@]}"} --out "$@")
    [[ -z $dry ]] || { "${simu[@]}" files "${at[@]}"; echo; "${simu[@]}" plan "${at[@]}"; echo; }
    $dry "${simu[@]}" original "${at[@]}"
    $dry "$python" "$here/eval.py" check "$1"
    $dry "${simu[@]}" attribute "${at[@]}"
    $dry "${simu[@]}" mask "${at[@]}"
    $dry "${simu[@]}" unlearn "${at[@]}" --method fo
    $dry "${simu[@]}" unlearn "${at[@]}" --method so
    $dry "${simu[@]}" unlearn "${at[@]}" --method simu
    $dry "$python" "$here/eval.py" evaluate "$1" ${force[@]+"${force[@]}"}
}
{ # read whole before it starts, so that editing this file does not derail a run
    pipeline "$run"
    for ((k = 1; k < seeds; k++)); do pipeline "$run-seed$k" --seed "$k"; done
    $dry "$python" "$here/eval.py" report "$run"
    exit
}
