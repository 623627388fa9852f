#!/usr/bin/env bash
# Every figure of docs/log.md that needs a GPU, in parts of a few minutes each: benchmarks/h100.sh OUT PART...
#
#   packing-135m packing-1.5b packing-8b   today's tools against packed trials, text of 300 tokens an example
#   short                                  the same at 135M with text under 40 tokens
#   study                                  start-up cold and warm, occupancy, empty slots, forecasts in a small study
#
# Run it in the root of a checkout with benchmarks/data (python -m benchmarks.workload) and, for `short`, `study` and the
# real weights of 135M, models/smollm2-135m. Each step has a time limit of its own, writes its lines to OUT as they come,
# and a step that failed does not end the part. SCRATCH (default /dev/shm) holds random weights, 16 GB at 8B.
set -uo pipefail
out=$1
shift
mkdir -p "$out"
scratch=${SCRATCH:-/dev/shm}

# A step: its time limit in seconds, then the benchmark and its arguments.
step() {
    local limit=$1 begun=$SECONDS
    shift
    timeout "$limit" python3 -m "$@" >>"$out/log.txt" 2>&1
    echo "$* : exit $? after $((SECONDS - begun)) s" | tee -a "$out/steps.txt"
}

packing() { # limit, shape, steps of a cold trial, slots, tokens, numbers of processes
    step "$1" benchmarks.packing --shape "$2" --mode cold warm processes solo pack --steps "$3" --seconds 12 --warm-up 3 \
        --slots "$4" --tokens "$5" --processes $6 --scratch "$scratch" --out "$out/packing.jsonl" "${@:7}"
}

for part in "$@"; do
    case $part in
    packing-135m) packing 560 135m 80 40 65536 "4 8 16" ;;
    packing-1.5b) packing 560 1.5b 80 12 24576 "2 4 8" ;;
    packing-8b) packing 590 8b 60 8 8192 "2 4" ;;
    short) packing 560 135m 80 64 65536 "8 16" --data short ;;
    study)
        for name in cold warm; do
            step 400 benchmarks.machine_time examples/lora-or-full-words.yaml --folder "$scratch/study" \
                --set "study=$name" --set "model=$PWD/models/smollm2-135m" \
                --set "data.train=$PWD/examples/data/define.jsonl" --out "$out/machine_time.jsonl"
        done
        step 60 benchmarks.forecast --study-db "$scratch/study/studies.db" --study cold --json
        cp "$scratch/study/studies.db" "$out/" 2>/dev/null
        ;;
    *) echo "there is no part $part" >&2 && exit 2 ;;
    esac
done
