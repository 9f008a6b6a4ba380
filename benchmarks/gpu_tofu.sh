#!/usr/bin/env bash
# TOFU whole on a pretrained model: SmolLM2-135M taught all 4,000 rows, retain-only beside it, then FO,
# SO, SIMU and SIMU with a random mask, each by graddiff and by level, under three seeds; the log ends
# in a table shaped like Table 1, mean ± standard deviation over the seeds (the 95% interval of a mean
# of three is 2.48 times that). A call ends before ten minutes and the next goes on (parts.sh); call
# until it says "done". Nothing is downloaded.
#
#   bash benchmarks/gpu_tofu.sh MODEL STATE         MODEL: the folder that benchmarks/smollm2.py makes
#   bash benchmarks/gpu_tofu.sh --tiny STATE        the same commands at tiny size on a CPU
#
# SIMU_DATA must hold tofu/. A machine whose files come anew with each call: MODEL and STATE lie
# outside of the repository. To run on while nobody watches: setsid, SIMU_CALL=86400, and poll STATE/done.
set -uo pipefail
from="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source benchmarks/parts.sh

# Rates: those of results/tofu-smollm2-135m where 40 rows ended, by graddiff and by level, and had 50
# updates; here 400 rows get 125. Not swept at this size.
declare -A rate=([fo:graddiff]=4e-5 [so:graddiff]=2e-5 [simu:graddiff]=3e-5
                 [fo:level]=5e-5 [so:level]=5e-5 [simu:level]=1e-4)
common=(--learn-retain-only --template qa --must-know 0)
if [[ "${1:-}" == --tiny ]]; then
    [[ $# -eq 2 ]] || { sed -n '9,10p' "${BASH_SOURCE[0]}" >&2; exit 2; }
    start "$2"
    model="$state/model" seeds=(0 1)
    part model 30 "$python" benchmarks/smollm2.py --tiny "$model"
    common+=(--data pipeline/demo --device cpu --dtype float32 --forget-groups 2 --retain-groups 2
        --learn-epochs 2 --epochs 1 --batch 4 --max-total-tokens 60)
else
    [[ $# -eq 2 ]] || { sed -n '9,10p' "${BASH_SOURCE[0]}" >&2; exit 2; }
    start "$2"
    model="$(absolute "$1")" seeds=(0 1 2)
    common+=(--device cuda --forget-groups 0 --retain-groups 0 --learn-epochs 10 --learn-batch 32
        --learn-lr 2e-4 --learn-tokens 16384 --micro-tokens 8192 --epochs 5 --batch 16)
fi

stage() { # stage SEED NAME STAGE [OPTION ...]: a stage that goes on from what it finished
    local seed="$1" name="$2" run="$state/run"
    ((seed == 0)) || run="$state/run-seed$seed"
    part "seed$seed-$name" 20 "$python" pipeline "$3" tofu smollm2-135m --weights "$model" --teach \
        --out "$run" --seed "$seed" "${common[@]}" "${@:4}"
}

for seed in "${seeds[@]}"; do
    stage "$seed" original original
    stage "$seed" attribution attribute
    stage "$seed" mask mask
    stage "$seed" mask-random mask --mask random
    for objective in graddiff level; do
        for method in fo so simu; do
            stage "$seed" "$method-$objective" unlearn --method "$method" --lam 2 \
                --objective "$objective" --lr "${rate[$method:$objective]}"
        done
        stage "$seed" "simu-random-$objective" unlearn --method simu --mask random --lam 2 \
            --objective "$objective" --lr "${rate[simu:$objective]}"
    done
    run="$state/run"
    ((seed == 0)) || run="$state/run-seed$seed"
    part "seed$seed-evaluation" 20 "$python" pipeline evaluate "$run"
done
[[ ${#left[@]} -gt 0 || ${#failed[@]} -gt 0 ]] ||
    { part report 10 "$python" pipeline report "$state/run"
      part seeds 5 sed -n '/^## Mean/,/^## [^M]/{/^## [^M]/!p}' "$state/run/report.md"; }
finish "$state/log.txt"
