#!/usr/bin/env bash
# Every figure of docs/log.md that needs a GPU, in parts of a few minutes each: benchmarks/h100.sh OUT PART...
#
#   packing-135m packing-1.5b packing-8b   today's tools against packed trials, text of 300 tokens an example
#   short                                  the same at 135M with text under 40 tokens
#   turnover                               a worker while trials come and go all the time
#   alone                                  trials in a pack against the same trials alone, and in 8-bit floats
#   memory                                 predicted against measured peaks, LoRA and full
#   attention                              a flat stream or fixed rows, and whose kernel
#   graphs                                 evaluations and full-parameter steps with and without CUDA graphs
#   full                                   full-parameter steps at 135M and 1.5B: tokens/s, MFU, peak memory
#   two                                    on two GPUs: the same at 1.5B, a trial that changes its GPUs, and 8B
#   study                                  start-up cold and warm, occupancy, empty slots, forecasts in a small study
#   long-study                             the same lines of a study of nine minutes, as long as one command may be here
#   verdict-words verdict-sums             LoRA or full: a whole study each, what sweep compare says of it, and the lines
#                                          of `study`
#
# Run it in the root of a checkout with benchmarks/data (python -m benchmarks.workload) and, for `short`, `study` and the
# real weights of 135M, models/smollm2-135m. Each step has a time limit of its own, writes its lines to OUT as they come,
# and a step that failed does not end the part. SCRATCH (default /dev/shm) holds random weights, 16 GB at 8B.
set -uo pipefail
out=$(realpath -m "$1")
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

packing() { # shape, slots, tokens, numbers of Trainers at once (more run out of memory), more
    local common=(--shape "$1" --seconds 8 --warm-up 3 --scratch "$scratch" --out "$out/packing.jsonl" "${@:5}")
    step 400 benchmarks.packing --mode cold pack solo processes --slots "$2" --tokens "$3" --processes $4 "${common[@]}"
    step 90 benchmarks.packing --mode warm --steps 60 "${common[@]}"
}

rounded() { # shape, slots, tokens: the packs in 8-bit floats
    step 120 benchmarks.packing --mode solo pack --precision fp8 --shape "$1" --slots "$2" --tokens "$3" --seconds 8 --warm-up 3 \
        --scratch "$scratch" --out "$out/packing.jsonl"
}

root=$PWD
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # a checkout is enough: nothing needs to be installed
declare -A rows=([words]=define.jsonl [sums]=sums.jsonl)
study() { # words or sums, more settings
    local settings=("model=$root/models/smollm2-135m" "data.train=$root/examples/data/${rows[$1]}")
    settings+=("data.retention=$root/examples/data/jargon.jsonl" "${@:2}")
    rm -rf "$scratch/study/runs" # checkpoints of the study before
    step 585 benchmarks.machine_time "examples/lora-or-full-$1.yaml" --folder "$scratch/study" \
        --out "$out/machine_time.jsonl" "${settings[@]/#/--set=}"
}

forecasts() { # of a study: how they held, and its database
    step 60 benchmarks.forecast --study-db "$scratch/study/studies.db" --study "$1" --json
    cp "$scratch/study/studies.db" "$out/" 2>/dev/null
}

for part in "$@"; do
    case $part in
    packing-135m) packing smollm2-135m 40 65536 "2 4" ;;
    packing-1.5b) packing 1.5b 12 24576 "2 3"; rounded 1.5b 12 24576 ;;
    packing-8b) packing 8b 8 8192 2; rounded 8b 8 8192 ;;
    short) packing smollm2-135m 64 65536 "4 8 16" --data short --seconds 20 ;;
    turnover) step 240 benchmarks.turnover --scratch "$scratch" --out "$out/turnover.jsonl" ;;
    alone) step 240 benchmarks.alone --tokens 32768 --fp8 --scratch "$scratch" --out "$out/alone.jsonl" ;;
    memory) step 580 benchmarks.memory --method full lora --total 350 --out "$out/memory.jsonl" ;;
    attention) step 150 benchmarks.attention --scratch "$scratch" --out "$out/attention.jsonl" ;;
    graphs) step 240 benchmarks.graphs --data short --scratch "$scratch" --out "$out/graphs.jsonl" ;;
    full)
        for shape in smollm2-135m 1.5b; do
            step 240 benchmarks.full --shape "$shape" --steps 30 --scratch "$scratch" --out "$out/full.jsonl"
        done
        ;;
    two)
        step 330 benchmarks.full --shape 1.5b --processes 1 2 --batch-size 96 --steps 26 --warm-up 4 --hand-over 2 1 2 \
            --scratch "$scratch" --out "$out/full.jsonl"
        step 230 benchmarks.full --shape 8b --processes 2 --checkpointing --batch-size 64 --steps 10 --warm-up 3 \
            --scratch "$scratch" --out "$out/full.jsonl"
        ;;
    study)
        for name in cold warm; do
            study words "study=$name" budget.cap=\$0.20 budget.reserve=\$0.08
        done
        forecasts cold
        ;;
    long-study)
        study sums study=long "search.method=[lora]" search.epochs=8 budget.cap=\$0.61 budget.reserve=\$0.08
        forecasts long
        ;;
    verdict-*)
        study "${part#verdict-}"
        (cd "$scratch/study" && for verb in "compare --claims" statement best; do
            COLUMNS=120 python3 -m sweep $verb "lora-or-full-${part#verdict-}"
        done) >>"$out/$part.txt" 2>&1
        forecasts "lora-or-full-${part#verdict-}"
        (cd "$scratch/study/runs" && tar -czf "$out/$part-logs.tgz" */workers/*/*.log) # what a start-up's time went to
        ;;
    *) echo "there is no part $part" >&2 && exit 2 ;;
    esac
done
