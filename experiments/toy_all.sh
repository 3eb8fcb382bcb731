#!/usr/bin/env bash
# Every experiment of RESULTS.md, each arm with seeds 0 to 4, then the tables and figures. Hours on two cores.
#
#   bash experiments/toy_all.sh                                all of it
#   bash experiments/toy_all.sh base masks                     some parts; most need `base` and `masks` first
#   bash experiments/toy_all.sh --steps 5 --eval-examples 32   a rehearsal with these flags, in out/rehearsal
#
# A run works in out/study/ARM/SEED and is kept in experiments/results.jsonl. A finished run is not repeated,
# a killed one goes on. Environment variables: SEEDS, JOBS (runs side by side), PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."

all="distance base masks pauses plans finite passes corruptions referring scaling guidance"
all="$all length adapters natural"
parts=
while [ $# -gt 0 ] && [[ $1 != --* ]]; do
    [[ " $all " == *" $1 "* ]] || { echo "toy_all.sh: no part $1; there are $all" >&2; exit 1; }
    parts="$parts $1"
    shift
done
export PYTHON=${PYTHON:-python} MORE="$*" STUDY=out/study EDITS=256 EXAMPLES=1024
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

once() {                                   # OUT FILE COMMAND: run it unless it has left FILE in OUT already
    local out=$1 file=$2
    shift 2
    [ ! -e "$out/$file" ] || return 0
    mkdir -p "$out"
    echo "$out/$file"
    "$PYTHON" "$@" > "$out/$file.txt" 2>&1 || { tail -n 1 "$out/$file.txt"; return 255; }    # xargs stops
}
as() {                                     # VARIANT, "photographs" or "-": how a script is called
    case $1 in
        -) echo -m ;;
        photographs) echo -m experiments.photographs ;;
        *) echo "-m experiments.variants $1" ;;
    esac
}
train() {                                  # ARM SEED VARIANT FLAGS
    local out=$STUDY/$1/$2 resume=
    [ ! -e "$out/last.pt" ] || resume=--resume
    once "$out" result.json $(as "$3") train --preset toy --seed "$2" --eval-examples $EXAMPLES \
        --out "$out" $resume "${@:4}" $MORE
}
toy() {                                    # ARM SEED VARIANT MODEL FLAGS: scores of the model of another arm
    local out=$STUDY/$1/$2
    once "$out" result.json $(as "$3") metrics toy --ckpt "$STUDY/$4/$2/last.pt" --steps 10 \
        --examples $EXAMPLES --out "$out/result.json" "${@:5}"
}
measure() {                                # ARM SEED VARIANT WHAT: measured on that arm's own model
    local out=$STUDY/$1/$2
    once "$out" "$4.json" $(as "$3") experiments.measure "$4" --ckpt "$out/last.pt" --examples $EDITS
}
photographs() {                            # ARM SEED MODEL FLAGS: scores of the model of another arm
    local out=$STUDY/$1/$2
    once "$out" photographs.json -m experiments.photographs score --ckpt "$STUDY/$3/$2/last.pt" \
        --examples $EXAMPLES --out "$out/photographs.json" "${@:4}"
}
export -f once as train toy measure photographs

each_seed() {                              # reads lines "FUNCTION ARM MORE", @ is the seed: each with each
    local function arm more
    while read -r function arm more; do
        for seed in $SEEDS; do
            echo "$function $arm $seed ${more//@/$seed}"
        done
    done | sed 's/ *$//' | xargs -P "${JOBS:-1}" -L 1 bash -c '"$@"' each_seed
}
arms() {                                   # FLAGS: reads lines "ARM VARIANT FLAGS" and trains each
    while read -r arm variant flags; do echo "train $arm $variant $* $flags"; done | each_seed
}
finetunes() {                              # FLAGS: the same, from the base of each seed, on harder edits
    arms --data hard --steps 600 --lr 3e-3 --muon-lr 0.015 --keep-every 150 --init "$STUDY/base/@/last.pt" "$@"
}

distance() {                               # is it the token that harms, or the target's distance?
    arms <<'END'
toy -
one-distance - --max-gap 0
END
    printf 'measure %s - distance\n' toy one-distance | each_seed
}
base() {                                   # captions and single edits, from scratch
    arms --data simple --steps 5600 --p-magd 0 --keep-every 800 <<< "base -"
    each_seed <<< "measure base - curve"
    each_seed <<< "toy base-guided - base --text-scale 2.5 --image-scale 1.5"
}
masks() {                                  # Tables 2, 6 and 7: how much is masked, when, how often, with what
    finetunes <<'END'
plain - --p-magd 0
magd - --p-magd 0.5
rate-0.5 - --r-mask 0.5
tau-0.5 - --tau 0.5
tau-0 - --tau 0
p-magd-1 - --p-magd 1
zero-mask - --mask-token zero
END
    printf 'measure %s - curve\n' plain magd | each_seed
}
pauses() {                                 # Tables 3 and 5, Figures 6 to 9, beside what costs as much
    finetunes --p-magd 0 <<'END'
pauses-32 - --max-pauses 32
fillers-32 filler --max-pauses 32
gap-64 - --max-gap 64
registers registers
deeper deeper
plans - --p-plan 0.5
END
    printf 'measure %s - pauses\n' plain magd pauses-32 plans | each_seed
    each_seed <<< "measure fillers-32 filler pauses"
    printf 'measure %s - curve\n' pauses-32 plans | each_seed
}
plans() {                                  # Eq. 7: where the plan stands and what it says; right, wrong, none
    finetunes --p-magd 0 --p-plan 0.5 <<'END'
plans-first plan-first
plans-shuffled plan-shuffled
plans-places plan-places
magd-plans - --p-magd 0.5
END
    each_seed <<'END'
toy plans-given - plans --plans
toy plans-given-wrong wrong-plan plans --plans
toy plans-first-given plan-first plans-first --plans
toy plans-first-given-wrong wrong-plan,plan-first plans-first --plans
toy plans-shuffled-given plan-shuffled plans-shuffled --plans
toy plans-shuffled-given-wrong wrong-plan,plan-shuffled plans-shuffled --plans
toy plans-places-given plan-places plans-places --plans
toy plans-places-given-wrong wrong-plan,plan-places plans-places --plans
toy magd-plans-given - magd-plans --plans
END
}
finite() {                                 # few samples again and again, with masks or with dropout
    finetunes <<'END'
plain-512 finite-512 --p-magd 0
magd-512 finite-512
dropout-512 finite-512,dropout --p-magd 0
plain-4096 finite-4096 --p-magd 0
magd-4096 finite-4096
dropout-4096 finite-4096,dropout --p-magd 0
END
}
passes() {                                 # two losses a sample: MDT's pairs, MC-DiT's clean to clean
    finetunes <<'END'
two-plain two-plain --p-magd 0
mdt mdt
mc-dit mc-dit
END
}
corruptions() {                            # `plain` has only noise, `magd` both
    finetunes <<'END'
only-mask - --corruption mask
mask-then-noise - --corruption mask-noise --mask-token zero
END
}
referring() {                              # instructions that a plan says more than: "the one left of ..."
    finetunes --data refer --p-magd 0 <<'END'
refer -
refer-plans - --p-plan 0.5
END
    each_seed <<'END'
toy refer-plans-given - refer-plans --plans
toy refer-plans-given-wrong wrong-plan refer-plans --plans
END
}
scaling() {                                # Sec. 6.1 at equal compute
    printf 'measure %s - scaling\n' plain magd pauses-32 | each_seed
}
guidance() {                               # at all times, or only in half of the way from noise to image
    each_seed <<'END'
toy guidance-all - plain --text-scale 2.5 --image-scale 1.5
toy guidance-text - plain --text-scale 2.5
toy guidance-early - plain --text-scale 2.5 --image-scale 1.5 --guidance-interval 0,0.5
toy guidance-late - plain --text-scale 2.5 --image-scale 1.5 --guidance-interval 0.5,1
END
}
length() {                                 # twice the steps
    finetunes --steps 1200 <<'END'
plain-1200 - --p-magd 0
magd-1200 - --p-magd 0.5
END
    printf 'measure %s - curve\n' plain-1200 magd-1200 | each_seed
}
adapters() {                               # LoRA instead of all weights
    finetunes <<< "lora-16 - --p-magd 0 --lora 16 --lr 3e-2 --muon-lr 0"
}
natural() {                                # a second world, of photographs, from scratch
    arms --steps 2000 <<'END'
photo-plain photographs --p-magd 0
photo-magd photographs --p-magd 0.5
photo-pauses photographs --p-magd 0 --max-pauses 32
END
    each_seed <<'END'
photographs photo-plain photo-plain
photographs photo-plain-8 photo-plain --pauses 8
photographs photo-magd photo-magd
photographs photo-pauses photo-pauses
photographs photo-pauses-8 photo-pauses --pauses 8
photographs photo-pauses-32 photo-pauses --pauses 32
END
}

keep() { "$PYTHON" -m experiments.study keep "$STUDY" --results "$results"; }
trap keep EXIT                             # after a failure too: what is finished counts
for part in ${parts:-$all}; do
    "$part"
done
trap - EXIT
keep
[ -n "$MORE" ] || "$PYTHON" -m experiments.study report experiments/RESULTS.md
