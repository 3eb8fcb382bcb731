#!/usr/bin/env bash
# Table 3, Figures 6 to 9, Table 5: pause tokens on the four models of table2.sh, against other fillers and other seeds.
source "$(dirname "$0")/study.sh"
pauses() {                                 # NAME SEED
    local out=results/$1/$2/pauses.json
    [ -e "$out" ] && return
    echo "$out"
    "$PYTHON" metrics.py pauses --ckpt "out/study/$1/$2/last.pt" --steps 10 --examples 160 --out "$out" 2> "out/study/$1/$2/pauses.txt" || return 255
}
export -f pauses
printf 'pauses %s\n' plain plans magd magd-plans | each_seed
