#!/usr/bin/env bash
# OLMo-1B at full size on real TOFU rows: made from random weights, then FO, SO and SIMU with the
# paper's recipe (a table shaped like Table 1) and over a grid of learning rates (the frontier).
# A call ends before ten minutes; call it again until it says "done". Nothing is downloaded.
#
#   bash benchmarks/olmo1b.sh OUT TOKENIZER          on a GPU; TOKENIZER: OLMo's, a folder
#   bash benchmarks/olmo1b.sh --tiny OUT TOKENIZER   the same commands at tiny size on a CPU
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
tiny=()
if [[ "${1:-}" == --tiny ]]; then tiny=(--tiny); shift; fi
[[ $# -eq 2 ]] || { sed -n '6,7s/^# *//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
out="$1" tokenizer="$2"
mkdir -p "$out" || exit 2
end=$((SECONDS + 570))

# step COMMAND...: cut off at the end of time; every command goes on from what it finished.
step() {
    local left=$((end - SECONDS)) status=0
    ((left > 5)) || { echo "out of time: call again" | tee -a "$out/log.txt"; exit 3; }
    echo "\$ ${*#"$here/"}" >> "$out/log.txt"
    timeout "$left" "$python" "$@" > >(tee -a "$out/log.txt") || status=$?
    if ((status == 124)); then echo "out of time: call again" | tee -a "$out/log.txt"; exit 3; fi
    ((status == 0)) || exit "$status"
}

slice=(--forget-groups 10 --retain-groups 60) device=cuda fast=(--seeds 3 --factors 0.25 0.5 1 2 4)
if [[ ${#tiny[@]} -gt 0 ]]; then
    slice=(--forget-groups 1 --retain-groups 1) device=cpu
    fast=(--seeds 1 --arms fo simu --factors 1 --no-variants)
fi
step "$here/benchmarks/olmo1b.py" "$out" --tokenizer "$tokenizer" --device "$device" \
    "${slice[@]}" ${tiny[@]+"${tiny[@]}"}
at=(tofu olmo-1b --weights "$out/weights" --device "$device" "${slice[@]}")
[[ ${#tiny[@]} -eq 0 ]] || at+=(--epochs 1 --batch 4 --max-total-tokens 60)
for command in original attribute mask "unlearn --method fo" "unlearn --method so" unlearn; do
    # shellcheck disable=SC2086
    step "$here/pipeline" $command "${at[@]}" --out "$out/run"
done
step "$here/pipeline" evaluate "$out/run"
step "$here/pipeline" report "$out/run"
step "$here/pipeline" sweep "${at[@]}" --out "$out/sweep" --jobs 1 "${fast[@]}"
step "$here/pipeline" figures all "$out/sweep"
echo "done" | tee -a "$out/log.txt"
