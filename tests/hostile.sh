#!/usr/bin/env bash
# Probes that the suite cannot make quickly, or not without root: a word on how each one ended.
#
#   bash tests/hostile.sh       as root (mounts are made in a namespace of their own); two minutes
#
# one line: status 2 (130 after Ctrl-C) and one line on stderr. made: status 0. Anything else is BAD,
# with what it said. python3 must not be a shim that answers Ctrl-C itself.
set -u
here="$(cd "$(dirname "$0")/.." && pwd)"
[[ "${1:-}" == inside ]] || exec unshare -m bash "$0" inside
export TQDM_DISABLE=1 OMP_NUM_THREADS=1 here
python="$(python3 -c 'import sys; print(sys.executable)')"
w="$(mktemp -d)"
trap 'cd /; umount "$w/run-tofu" "$w/full" 2>/dev/null; rm -rf "$w"' EXIT
(cd "$here/tests" && "$python" -c "import fuzz, pathlib; fuzz.make_world(pathlib.Path('$w'))") >/dev/null 2>&1
micro="--width 64 --depth 1 --vocab 400 --context 96 --learn-epochs 1 --light-epochs 1 --batch 2"
micro+=" --max-total-tokens 40 --max-new-tokens 6 --rows-per-author 1 --lume-fraction 1 --device cpu --data $w/data"
run="$python $here/pipeline"
at="tofu tiny-llama --epochs 1 $micro"
failed=0

probe() { # probe WANTED NAME COMMAND
    local said status how
    said="$(eval "$3" 2>&1 >/dev/null)"
    status=$?
    how="BAD ($status)"
    [[ $status -ne 0 ]] || how=made
    [[ ! ($status -eq 2 || $status -eq 130) || "$said" != error:* || "$said" == *$'\n'* ]] || how="one line"
    [[ "$how" == "$1" ]] || { failed=1; how="BAD: $how for $1, $status: $said"; }
    printf '%-9s %s\n' "$how" "$2"
}
interrupt() { # interrupt SECONDS COMMAND...: Ctrl-C at its whole process group
    setsid "$python" -c 'import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])' "${@:2}" &
    local pid=$!
    sleep "$1"
    kill -INT -- "-$pid"
    wait "$pid"
}
kill_worker() { # kill_worker COMMAND...: SIGKILL for the first process it starts
    "$@" &
    local pid=$! worker=""
    while [[ -z "$worker" ]] && kill -0 "$pid"; do
        sleep 0.2
        worker="$(pgrep -P "$pid" -f spawn_main | head -1)"
    done
    sleep 1
    kill -KILL "$worker"
    wait "$pid"
}

mount --bind "$w/run-tofu" "$w/run-tofu" && mount -o remount,ro,bind "$w/run-tofu"
probe made "read-only run: plan" "$run plan $at --out $w/run-tofu"
probe made "read-only run: --dry-run" "SIMU_DATA=$w/data bash $here/run.sh tofu tiny-llama --dry-run --out $w/run-tofu"
for stage in "report $w/run-tofu" "evaluate $w/run-tofu" "mask $at --out $w/run-tofu"; do
    probe "one line" "read-only run: ${stage%% *}" "$run $stage"
done
umount "$w/run-tofu"
user="setpriv --bounding-set=-dac_override,-dac_read_search,-fowner --inh-caps=-all $run"
for name in weights-tofu/config.json weights-tofu/tokenizer.model weights-lume/tokenizer.json \
        weights-tofu/model.safetensors data/tofu/forget10.json data/tofu; do
    mode="$(stat -c %a "$w/$name")"
    chmod 0 "$w/$name"
    cell="$at"
    [[ "$name" != *lume* ]] || cell="lume tiny-olmo --epochs 1 $micro"
    probe "one line" "no permission: $name" "$user original $cell --out $w/p --weights $w/${name%%/*}"
    chmod "$mode" "$w/$name"
    rm -rf "$w/p"
done
mkdir "$w/full" && mount -t tmpfs -o size=300k tmpfs "$w/full"
probe "one line" "full disk: llama" "$run original $at --out $w/full/o"
probe "one line" "full disk: olmo" "$run original lume tiny-olmo --epochs 1 $micro --out $w/full/o2"
umount "$w/full"
for kib in 200000 680000 760000; do
    probe "one line" "ulimit -v $kib" "(ulimit -v $kib; $run original demo tiny-llama --width 512 --depth 8 --learn-epochs 1 --out $w/u)"
done
probe made "stdout closed" "$run evaluate $w/run-tofu --force >&-"
probe made "stderr not to be written to" "env -u TQDM_DISABLE $run original $at --out $w/e 2</dev/null"
probe "one line" "stdout on a full device" "$run report $w/run-tofu >/dev/full"
each="unlearn tofu tiny-llama --epochs 400 $micro --out $w/run-tofu --force --each fo:graddiff so:graddiff"
probe "one line" "SIGKILL of a worker: --each" "kill_worker $run $each"
probe made "and the same again" "$run ${each/400/2}"
sweep="sweep $at --seeds 2 --jobs 2 --arms fo so --factors 1 2 --no-variants --out $w/s"
probe "one line" "SIGKILL of a worker: sweep" "kill_worker $run $sweep"
probe made "and the same again" "$run $sweep"
for seconds in 0.5 1 2 3 4; do
    probe "one line" "Ctrl-C after $seconds s: --each" "interrupt $seconds $run $each"
done
exit $failed
