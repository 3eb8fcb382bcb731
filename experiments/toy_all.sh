#!/usr/bin/env bash
# Every experiment of RESULTS.md, each arm with seeds 0 to 4, then the tables and figures. Hours on two cores.
#
#   bash experiments/toy_all.sh                                all of it
#   bash experiments/toy_all.sh training masks                 some parts; most need `training` to be there
#   bash experiments/toy_all.sh --steps 5 --eval-examples 32   a rehearsal with these flags, in out/rehearsal
#
# A run works in out/study/ARM/SEED and is kept in experiments/results.jsonl. A finished run is not repeated,
# a killed one goes on. Environment variables: SEEDS, JOBS (runs side by side), PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."

all="training plans masks corruptions pauses guidance predictions size"
parts=
while [ $# -gt 0 ] && [[ $1 != --* ]]; do
    [[ " $all " == *" $1 "* ]] || { echo "toy_all.sh: no part $1; there are $all" >&2; exit 1; }
    parts="$parts $1"
    shift
done
export PYTHON=${PYTHON:-python} MORE="$*" STUDY=out/study EDITS=160 EXAMPLES=512
results=experiments/results.jsonl
if [ -n "$MORE" ]; then
    STUDY=out/rehearsal EDITS=8 EXAMPLES=8
    results=out/rehearsal/results.jsonl
fi
SEEDS=${SEEDS:-0 1 2 3 4}
if "$PYTHON" -c "import sys, torch; sys.exit(torch.cuda.is_available())"; then    # no GPU: one thread each
    JOBS=${JOBS:-2}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

once() {                                   # ARM SEED FILE COMMAND: run it unless it has left FILE already
    local out=$STUDY/$1/$2 file=$3
    shift 3
    [ ! -e "$out/$file" ] || return 0
    mkdir -p "$out"
    echo "$out/$file"
    "$PYTHON" "$@" > "$out/$file.txt" 2>&1 || { tail -n 1 "$out/$file.txt"; return 255; }    # xargs stops
}
train() {                                  # ARM SEED FLAGS
    local out=$STUDY/$1/$2 resume=
    [ ! -e "$out/last.pt" ] || resume=--resume
    once "$1" "$2" result.json train.py --preset small --seed "$2" --out "$out" $resume "${@:3}" $MORE
}
toy() {                                    # ARM SEED MODEL FLAGS: scores of the model of another arm
    once "$1" "$2" toy.json metrics.py toy --ckpt "$STUDY/$3/$2/last.pt" --steps 10 --examples $EXAMPLES \
        --out "$STUDY/$1/$2/toy.json" "${@:4}"
}
pause_counts() {                           # ARM SEED
    local out=$STUDY/$1/$2
    once "$1" "$2" pauses.json -m experiments.study pauses --ckpt "$out/last.pt" --steps 10 \
        --examples $EDITS --out "$out/pauses.json"
}
export -f once train toy pause_counts

each_seed() {                              # reads lines "FUNCTION ARM FLAGS", @ is the seed: each with each
    local function arm flags
    while read -r function arm flags; do
        for seed in $SEEDS; do
            echo "$function $arm $seed ${flags//@/$seed}"
        done
    done | sed 's/ *$//' | xargs -P "${JOBS:-1}" -L 1 bash -c '"$@"' each_seed
}
arms() {                                   # FLAGS: reads lines "ARM FLAGS" and trains each
    while read -r arm flags; do echo "train $arm $* $flags"; done | each_seed
}
finetunes() {                              # BASE FLAGS: the same, from the base of each seed, on harder edits
    arms --data hard --steps 400 --lr 3e-3 --muon-lr 0.015 --init "$STUDY/$1/@/last.pt" "${@:2}"
}

training() {                               # Table 2: a base, then further steps on harder edits in four ways
    arms <<< "base --data simple --steps 2000 --p-magd 0"
    finetunes base <<'END'
plain --p-magd 0
plans --p-magd 0 --p-plan 0.5
magd --p-magd 0.5
magd-plans --p-magd 0.5 --p-plan 0.5
END
    each_seed <<< "toy base-on-hard base --data hard"
}
plans() {                                  # Table 2: with the plan of each edit at inference too
    each_seed <<'END'
toy plans-not-given plans
toy plans-given plans --plans
toy magd-plans-not-given magd-plans
toy magd-plans-given magd-plans --plans
END
}
masks() {                                  # Tables 6 and 7: how much is masked, when, how often, with what
    finetunes base <<'END'
rate-0.5 --r-mask 0.5
tau-0.5 --tau 0.5
tau-0 --tau 0
p-magd-1 --p-magd 1
zero-mask --mask-token zero
END
}
corruptions() {                            # `plain` has only noise, `magd` both
    finetunes base <<'END'
only-mask --corruption mask
mask-then-noise --corruption mask-noise --mask-token zero
END
}
pauses() {                                 # Tables 3 and 5, Figures 6 to 9
    printf 'pause_counts %s\n' plain plans magd magd-plans | each_seed
}
guidance() {                               # at all times, or only in half of the way from noise to image
    each_seed <<'END'
toy guidance-none plain
toy guidance-all plain --text-scale 2.5 --image-scale 1.5
toy guidance-early plain --text-scale 2.5 --image-scale 1.5 --guidance-interval 0,0.5
toy guidance-late plain --text-scale 2.5 --image-scale 1.5 --guidance-interval 0.5,1
END
}
predictions() {                            # what the network predicts, from scratch
    arms --data simple --steps 800 --p-magd 0 <<'END'
predict-velocity --prediction velocity
predict-noise --prediction noise
predict-x --prediction x
END
}
size() {                                   # 100 and 800 steps of fine-tuning; widths 64 and 192
    local width
    finetunes base <<'END'
plain-steps-100 --p-magd 0 --steps 100
magd-steps-100 --p-magd 0.5 --steps 100
plain-steps-800 --p-magd 0 --steps 800
magd-steps-800 --p-magd 0.5 --steps 800
END
    for width in "64 --heads 2 --mlp 128" "192 --heads 6 --mlp 384"; do
        arms --width $width <<< "base-width-${width%% *} --data simple --steps 2000 --p-magd 0"
        finetunes "base-width-${width%% *}" --width $width <<END
plain-width-${width%% *} --p-magd 0
magd-width-${width%% *} --p-magd 0.5
END
    done
}

keep() { "$PYTHON" -m experiments.study keep "$STUDY" --results "$results"; }
trap keep EXIT                             # after a failure too: what is finished counts
for part in ${parts:-$all}; do
    "$part"
done
trap - EXIT
keep
[ -n "$MORE" ] || "$PYTHON" -m experiments.study report experiments/RESULTS.md
