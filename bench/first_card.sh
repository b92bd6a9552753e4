#!/usr/bin/env bash
# What a card shows in 13 minutes: tests, kernels, models; results in one folder, at most 8 files.
#
#   bench/first_card.sh [--wheels DIR] [--image-model FILE --prompts FILE] [PART ...]
#   bench/first_card.sh --device cpu --quick         to try the script without a GPU
#
# PART: correctness (tests marked gpu, 2 minutes), kernels (bench/gpu, 6), models (bench/in_comfyui,
# 5); all unless told otherwise. The folder is $OUT, by default first_card in this repository.
#
# The Python is $PYTHON, that of .venv or python3. It needs torch. What else is missing is left out
# and named: pytest and hypothesis for the tests, Triton for this pack's kernels, comfy-kitchen for
# stock's, and ComfyUI ($COMFYUI_PATH, or that of `make setup`) for models. Without internet,
# --wheels names a folder of such packages. Exits with 1 if something is wrong, not if time ran out.

set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd) || exit

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

device=cuda options=() image=() wheels="" parts=()
while (($#)); do
    case $1 in --device | --wheels | --image-model | --prompts) (($# > 1)) || set -- "" ;; esac
    case $1 in
        --device) device=$2 && shift 2 ;;
        --quick) options+=(--quick) && shift ;;
        --wheels) wheels=$(absolute "$2") && shift 2 ;;
        --image-model | --prompts) image+=("$1" "$(absolute "$2")") && shift 2 ;;
        correctness | kernels | models) parts+=("$1") && shift ;;
        *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done
((${#parts[@]})) || parts=(correctness kernels models)
options+=(--device "$device")

python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
case $python in */*) python=$(absolute "$python") ;; esac
out=$([ -n "${OUT:-}" ] && absolute "$OUT" || echo "$root/first_card")
cd "$root" && mkdir -p "$out" && exec 9< "$out" || exit
if command -v flock > /dev/null && ! flock -n 9; then
    echo "another run writes to $out" >&2
    exit 1
fi
work=$(mktemp -d) || exit
running=""
trap 'rm -rf "$work"' EXIT
trap stop INT TERM
export TMPDIR=$work PYTHONUNBUFFERED=1 PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
mkdir "$work/site"
ln -s "$PWD" "$work/site/mxfp8"
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" \
        "$wheels"/*.whl || exit
fi
failed=0
summary=$out/summary.txt
[ ${#parts[@]} = 3 ] && rm -f "$summary"
say() { echo "$*" >> "$summary"; }

# Ends what runs, too: `timeout` has put it where Ctrl-C does not reach.
stop() {
    trap "" INT TERM
    [ -n "$running" ] && kill "$running" && wait "$running"
    say "== interrupted"
    exit 130
}

# Runs a command for so many seconds, its output in the log of a part; sets `status`.
limited() {
    local part=$1 signal=$2 seconds=$3
    shift 3
    mkfifo "$work/output"
    tee "$out/$part/log.txt" < "$work/output" &
    local tee=$!
    timeout -s "$signal" -k 5 "$seconds" "$@" > "$work/output" 2>&1 &
    running=$!
    wait "$running" # a trap waits for no command but this one
    status=$? running=""
    wait "$tee"
    rm "$work/output"
    tail -c 8M "$out/$part/log.txt" | sed "s|$work|...|g; s|$PWD|...|g; s|$HOME|...|g" \
        > "$work/log" && cp "$work/log" "$out/$part/log.txt"
    case $status in
        0 | 3) ;; # 3: bench/in_comfyui found no ComfyUI that starts
        124 | 137) say "stopped after $seconds s" ;;
        *) failed=1 ;;
    esac
}

# Adds lines of a part's log to the summary.
keep() { grep -E "$2" "$out/$1/log.txt" | cut -c1-300 >> "$summary"; }

correctness() {
    local tests=(-m gpu tests/kernels/triton tests/kernels tests/quant/test_cost.py) workers=()
    if ! "$python" -c "import pytest, pytest_timeout, hypothesis, safetensors" 2> "$work/reason"; then
        say "left out: the tests, $(tail -n 1 "$work/reason")"
        say "  for these: pip install pytest pytest-timeout hypothesis safetensors"
        limited correctness TERM 115 "$python" bench/gpu "${options[@]}" \
            --section check --minutes 1.8 --out "$work"
        keep correctness "WRONG|checks, "
        return
    fi
    if [ "$device" = cpu ]; then
        tests=(tests/kernels/test_layout.py tests/kernels/test_dequantize.py)
    elif "$python" -c "import xdist" 2> /dev/null; then
        workers=(-n 4)
    fi
    limited correctness INT 115 "$python" -m pytest -v "${workers[@]}" "${tests[@]}"
    keep correctness "^(FAILED|ERROR) |^=.*(passed|failed|skipped|error|no tests)"
    grep -qE "(^| )(FAILED|ERROR) " "$out/correctness/log.txt" && failed=1
}

kernels() {
    limited kernels TERM 355 "$python" bench/gpu "${options[@]}" --minutes 5.8 --out "$out/kernels"
    keep kernels "^WRONG|: (holds|FAILS)$|^left out|checks, "
}

models() {
    limited models TERM 295 "$python" bench/in_comfyui "${options[@]}" "${image[@]}" \
        --minutes 4.7 --out "$out/models"
    keep models "WRONG|not run| ms |^left out"
}

"$python" - "$device" >> "$summary" << 'END' || exit
import platform
import sys

import torch

print("torch", torch.__version__, platform.platform())
if sys.argv[1] != "cpu":
    if not torch.cuda.is_available():
        sys.exit("this torch finds no GPU; --device cpu --quick tries the script without one")
    print(torch.cuda.get_device_properties(0))
END
for part in "${parts[@]}"; do
    rm -rf "${out:?}/$part" && mkdir "$out/$part"
    say "== $part"
    "$part"
done
if ((failed)); then say "== something is wrong"; else say "== nothing is wrong"; fi
echo && cat "$summary"
echo "results: $out, $(find "$out" -type f | wc -l) files"
exit "$failed"
