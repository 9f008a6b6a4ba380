#!/usr/bin/env bash
# Attribution, unlearning and decoding at LLaMA2-7B and OLMo-1B size with random weights, ours and
# transformers' in one run, with the card's limits beside them; nothing is downloaded. A call ends
# before ten minutes and the next goes on (parts.sh); call until it says "done".
#
#   bash benchmarks/gpu.sh STATE [LOG]         one large GPU; STATE: a folder that outlives the call
#   bash benchmarks/gpu.sh --tiny STATE [LOG]  the same at tiny size on a CPU: is it ready?
#
# LOG: default STATE/log.txt. The cell through the stages is checkpoint7b.py's, TOFU gpu_tofu.sh's.
set -uo pipefail
from="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source benchmarks/parts.sh

tiny=no
if [[ "${1:-}" == --tiny ]]; then tiny=yes; shift; fi
[[ $# -ge 1 ]] || { sed -n '6,7s/^# *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ "$tiny" == yes ]] || "$python" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null ||
    { echo "error: torch sees no GPU; on a CPU use: bash benchmarks/gpu.sh --tiny STATE" >&2; exit 2; }
start "$1"
log="$(absolute "${2:-$1/log.txt}")"
bench() { part "$1" "$2" "$python" "benchmarks/$3.py" "${@:4}"; }  # NAME SECONDS SCRIPT ...

if [[ "$tiny" == yes ]]; then
    bench limits 60 limits --size tiny
    bench attribution 60 attribution --forget10 20 --size tiny
    bench simu 60 unlearning --size tiny --batch 4 --updates 1 --ways simu --micro-tokens 512
    bench updates 60 unlearning --size tiny --batch 4 --updates 1 --state bfloat16 --peer-rows 2
    bench passes 60 unlearning --passes --size tiny --batch 4 --updates 1
    bench decoding 60 decoding --learn 0 --prompts 8 --new 8 --size tiny --repeats 1
    finish "$log"
    exit
fi

gpu=(--device cuda --dtype bfloat16)
seven=(--size llama2-7b "${gpu[@]}") one=(--size olmo-1b "${gpu[@]}")
part card 10 nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
bench limits-7b 60 limits "${seven[@]}"
# An update of each method and transformers' way, in the state that lets FO and SO fit 80 GB.
bench updates-7b 150 unlearning --critical 722 --state bfloat16 --micro-tokens 2048 --updates 3 \
    --peer-rows 4 "${seven[@]}"
bench simu-7b 90 unlearning --ways simu --critical 722 --micro-tokens 2048 --updates 10 "${seven[@]}"
bench passes-7b 60 unlearning --passes --micro-tokens 4096 "${seven[@]}"
bench attribution-7b 200 attribution --forget10 400 "${seven[@]}"
bench decoding-7b-32 150 decoding --learn 0 --repeats 1 --prompts 32 --new 100 "${seven[@]}"
bench decoding-7b-256 200 decoding --learn 0 --repeats 1 --prompts 256 --new 60 "${seven[@]}"
bench updates-1b 90 unlearning --critical 29554 --micro-tokens 4096 --peer-rows 8 "${one[@]}"
bench passes-1b 60 unlearning --passes --micro-tokens 4096 "${one[@]}"
bench attribution-1b 60 attribution --forget10 400 "${one[@]}"
bench decoding-1b 90 decoding --learn 0 --repeats 2 "${one[@]}"
# Drafts that hit: rows that a model learned here, then the same model collapsed.
bench drafts 60 decoding --repeats 2 --device cuda
finish "$log"
