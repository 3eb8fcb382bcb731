#!/usr/bin/env bash
# Every experiment of RESULTS.md, five seeds each, then its tables and figures. Hours on two CPU cores; run it again to go on.
set -euo pipefail
cd "$(dirname "$0")/.."
for part in table2 plans table6 corruptions pauses guidance predictions size; do
    bash "runs/$part.sh" "$@"
done
[ $# -gt 0 ] || "${PYTHON:-python}" tools/study.py report RESULTS.md README.md
