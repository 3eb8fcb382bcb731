#!/usr/bin/env bash
# Every number and figure of related/README.md, with seeds 0 to 2: two and a half hours on two cores.
#
#   bash related/all.sh
#
# Works in out/related/ARM/SEED, keeps the scores in related/results.jsonl. What is finished is not repeated,
# a killed run goes on. Environment variables: SEEDS, JOBS (seeds side by side), PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1 OUT=out/related
mkdir -p $OUT

compare() {                                # PART ARM SEED: unless the scores of this arm are there
    [ -e "$OUT/$2/$3/result.json" ] || "$PYTHON" -m related.masked compare "$1" --seed "$3"
}
one_seed() {
    local arm
    for arm in teacher one-order learned-order dimo twice-dimo naive; do
        "$PYTHON" -m related.masked train $arm --seed "$1" || return
    done
    compare samplers checked "$1" && compare orders unchecked "$1" && compare students truth "$1"
}
export -f compare one_seed

printf '%s\n' ${SEEDS:-0 1 2} | xargs -P "${JOBS:-2}" -I @ bash -c \
    'one_seed @ > $OUT/@.log 2>&1 || { tail -n 1 $OUT/@.log; exit 255; }'                 # 255: xargs stops
"$PYTHON" -m experiments.study keep $OUT --results related/results.jsonl
"$PYTHON" -m related.masked sample --picture related/sample.png
"$PYTHON" -m related.masked figures
"$PYTHON" -m experiments.study report related/README.md
