# What the experiments share; the other scripts read it in. `arms FLAGS` reads lines "NAME MORE_FLAGS" and trains each of them with each
# seed: out/study/NAME/SEED. A finished run is not repeated, a killed one goes on; its result.json is copied to results/NAME/SEED.
# `@` in the flags is the seed. Without a GPU two runs go side by side with one thread each; JOBS, SEEDS and PYTHON change that.
# Flags given to a script go to all of its runs: `bash runs/toy_all.sh --steps 5 --eval-examples 8` is a rehearsal.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-python} MORE="$*"
if "$PYTHON" -c "import sys, torch; sys.exit(torch.cuda.is_available())"; then
    JOBS=${JOBS:-2}; export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
    JOBS=${JOBS:-1}
fi
SEEDS=${SEEDS:-0 1 2 3 4}

one() {                                    # NAME SEED FLAGS: one run
    local out=out/study/$1/$2 result=results/$1/$2 seed=$2 resume=
    shift 2
    [ -e "$out/result.json" ] && return
    [ -e "$out/last.pt" ] && resume=--resume
    mkdir -p "$out" "$result"
    echo "$out"
    "$PYTHON" train.py --preset small --seed "$seed" --out "$out" ${resume} "$@" ${MORE} > "$out/stdout.txt" 2> "$out/stderr.txt" ||
        { tail -n 1 "$out/stderr.txt"; return 255; }                   # 255: xargs stops
    cp "$out/result.json" "$result/result.json"
}
export -f one

each_seed() {                              # lines "COMMAND NAME MORE" on stdin, each for each seed, side by side
    while read -r command name more; do
        for seed in $SEEDS; do echo "$command $name $seed ${more//@/$seed}"; done
    done | xargs -P "$JOBS" -I{} bash -c '{}'
}
arms() { sed '/^ *$/d; s/^/one /; s#$# '"$*"'#' | each_seed; }
finetunes() { arms --data hard --steps 400 --lr 3e-3 --muon-lr 0.015 --init out/study/base/@/last.pt; }
