#!/usr/bin/env bash
# Attribution, unlearning and decoding at LLaMA2-7B and OLMo-1B size with random weights, in one
# call of under ten minutes on one large GPU; nothing is downloaded. The log goes to the file named.
# A 7B checkpoint through the stages themselves is a call of its own: benchmarks/checkpoint7b.py.
#
#   bash benchmarks/gpu.sh [LOG]        default: benchmarks/results/gpu.txt
#   bash benchmarks/gpu.sh --tiny [LOG] the same commands at tiny size on the CPU: is it ready?
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

tiny=no
if [[ "${1:-}" == --tiny ]]; then tiny=yes; shift; fi
[[ "$tiny" == yes ]] || "$python" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null ||
    { echo "error: torch sees no GPU; on a CPU use: bash benchmarks/gpu.sh --tiny" >&2; exit 2; }
log="${1:-benchmarks/results/gpu.txt}"
mkdir -p "$(dirname "$log")"
: > "$log"
end=$((SECONDS + 590))

# bench SECONDS SCRIPT ARGUMENTS: one benchmark, cut off at its limit or at the end of all time.
bench() {
    local limit="$1" left=$((end - SECONDS)) status=0
    shift
    ((left < limit)) && limit=$left
    if ((limit < 10)); then echo "no time left for: $*" | tee -a "$log"; return; fi
    timeout "$limit" "$python" "benchmarks/$1.py" "${@:2}" 2> >(tail -n 3 >&2) | tee -a "$log" ||
        { status=$?; echo "status $status from: $*" | tee -a "$log"; failed=1; }
    echo "-- $SECONDS s" | tee -a "$log"
}
failed=0

if [[ "$tiny" == yes ]]; then
    bench 60 attribution --forget10 20 --size tiny
    bench 60 unlearning --size tiny --batch 4 --updates 1 --ways simu --micro-tokens 512
    bench 60 unlearning --size tiny --batch 4 --updates 1 --state bfloat16 --peer-rows 2
    bench 60 unlearning --passes --size tiny --batch 4 --updates 1
    bench 60 decoding --learn 0 --prompts 8 --new 8 --size tiny --repeats 1
    exit "$failed"
fi

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee -a "$log"
gpu=(--device cuda --dtype bfloat16)

# 400 pairs, about 17,400 samples: the goal is four minutes.
bench 280 attribution --forget10 400 --size llama2-7b "${gpu[@]}"
bench 60 attribution --forget10 400 --size olmo-1b "${gpu[@]}"
# SIMU as on a 48 GB card; then all methods with the state that lets FO and SO fit one 80 GB card.
bench 90 unlearning --size llama2-7b --ways simu --critical 722 --micro-tokens 512 --updates 10 \
    "${gpu[@]}"
bench 120 unlearning --size llama2-7b --critical 722 --state bfloat16 --micro-tokens 512 \
    --peer-rows 4 "${gpu[@]}"
bench 60 unlearning --size olmo-1b --critical 29554 --peer-rows 4 "${gpu[@]}"
bench 40 unlearning --passes --size olmo-1b "${gpu[@]}"
bench 60 unlearning --passes --size llama2-7b "${gpu[@]}"
# Drafts that hit: rows that a model learned here, then the same model collapsed.
bench 60 decoding --repeats 2 --device cuda
bench 90 decoding --learn 0 --size olmo-1b --repeats 2 "${gpu[@]}"
bench 200 decoding --learn 0 --size llama2-7b --repeats 1 "${gpu[@]}"
exit "$failed"
