# Sourced by the scripts that measure on a lent machine: a call ends before ten minutes, and the next
# one goes on where it stopped. What is finished stands in $state/done, a name a line; what every
# part printed, in its last attempt, in $state/NAME.txt.
#
#   part NAME SECONDS COMMAND...   once; not begun where fewer seconds are left, unless it is the
#                                  first of its call. A command that keeps what it has done may ask
#                                  for few: it is stopped at the call's end, and called again.
#   finish LOG                     all parts into LOG; says "done", or what is left (status 3)

export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
python="${PYTHON:-python3}"
end=$((SECONDS + ${SIMU_CALL:-570})) begun=no names=() left=() failed=()

absolute() { [[ "$1" == /* ]] && echo "$1" || echo "$from/$1"; } # from: the caller's folder

start() { # start STATE: the folder where parts are kept
    state="$(absolute "$1")"
    mkdir -p "$state" && touch "$state/done" || exit 2
}

part() {
    local name="$1" need="$2" room=$((end - SECONDS)) status=0 from=$SECONDS
    shift 2
    names+=("$name")
    ! grep -qx "$name" "$state/done" || return 0
    if ((room < 5)) || { ((room < need)) && [[ $begun == yes ]]; }; then
        left+=("$name")
        return
    fi
    begun=yes
    timeout --kill-after=20 "$room" "$@" > >(tee "$state/$name.txt") 2> "$state/$name.err" ||
        status=$?
    if ((status == 124 || status == 137)); then
        left+=("$name")
        echo "$name: out of time after $((SECONDS - from)) s"
    elif ((status)); then
        failed+=("$name")
        echo "$name: status $status, $(tail -n 1 "$state/$name.err")" | tee -a "$state/$name.txt"
    else
        echo "-- $name: $((SECONDS - from)) s" | tee -a "$state/$name.txt"
        echo "$name" >> "$state/done"
    fi
}

finish() {
    local name
    mkdir -p "$(dirname "$1")"
    for name in "${names[@]}"; do cat "$state/$name.txt" 2>/dev/null; done > "$1"
    ((${#failed[@]} == 0)) || echo "failed: ${failed[*]}; call again to try again"
    if ((${#left[@]})); then echo "left: ${left[*]}; call again"; exit 3; fi
    ((${#failed[@]} == 0)) || exit 1
    echo "done: $1"
}
