# What the experiments share; the other scripts read it in. It trains arms with seeds 0 to 4: `arms FLAGS` reads lines "NAME OWN_FLAGS" and
# runs each with each seed in out/study/NAME/SEED; its result.json goes to results/NAME/SEED. A finished run is not repeated, a killed one
# goes on. `@` in the flags is the seed. Without a GPU two runs go side by side with one thread each; JOBS, SEEDS and PYTHON change that.
# Flags given to a script are for a rehearsal, apart in out/rehearsal: `bash runs/toy_all.sh --steps 5 --eval-examples 32`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-python} MORE="$*" STUDY=out/study RESULTS=results
[ -z "$MORE" ] || { STUDY=out/rehearsal; RESULTS=out/rehearsal/results; }
if "$PYTHON" -c "import sys, torch; sys.exit(torch.cuda.is_available())"; then
    JOBS=${JOBS:-2}; export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
SEEDS=${SEEDS:-0 1 2 3 4}

make() {                                   # NAME SEED FILE COMMAND: run it unless it has left FILE already; FILE goes to the results
    local out=$STUDY/$1/$2 results=$RESULTS/$1/$2 file=$3
    shift 3
    mkdir -p "$out" "$results"
    if [ ! -e "$out/$file" ]; then
        echo "$out/$file"
        "$PYTHON" "$@" > "$out/$file.txt" 2>&1 || { tail -n 1 "$out/$file.txt"; return 255; }          # 255: xargs stops
    fi
    cp "$out/$file" "$results/$file"
}

train() {                                  # NAME SEED FLAGS
    local out=$STUDY/$1/$2 resume=
    [ -e "$out/last.pt" ] && resume=--resume
    make "$1" "$2" result.json train.py --preset small --seed "$2" --out "$out" $resume "${@:3}" $MORE
}

pauses() {                                 # NAME SEED
    local out=$STUDY/$1/$2
    make "$1" "$2" pauses.json tools/study.py pauses --ckpt "$out/last.pt" --steps 10 --examples $([ -z "$MORE" ] && echo 160 || echo 8) --out "$out/pauses.json" || return
    cp "$out/pauses.png" "$RESULTS/$1/$2/"
}
toy() {                                    # NAME SEED MODEL FLAGS: another evaluation of the model
    local out=$STUDY/$1/$2
    make "$1" "$2" toy.json metrics.py toy --ckpt "$STUDY/$3/$2/last.pt" --steps 10 --examples $([ -z "$MORE" ] && echo 512 || echo 8) --out "$out/toy.png" "${@:4}"
}
export -f make train pauses toy

each_seed() {                              # lines "FUNCTION NAME MORE", each for each seed, side by side
    while read -r line; do
        for seed in $SEEDS; do read -r function name more <<< "${line//@/$seed}"; echo "$function $name $seed $more"; done
    done | xargs -P "${JOBS:-1}" -I{} bash -c '{}'
}
arms() { while read -r name own; do echo "train $name $* $own"; done | each_seed; }
finetunes() { arms --data hard --steps 400 --lr 3e-3 --muon-lr 0.015 --init "$STUDY/${base:-base}/@/last.pt" "$@"; }
