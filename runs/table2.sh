#!/usr/bin/env bash
# Table 2: a base model (text-to-image and single edits), then as many further steps on harder edits, in four ways.
source "$(dirname "$0")/study.sh"
arms <<< "base --data simple --steps 2000 --p-magd 0"
finetunes <<'END'
plain --p-magd 0
plans --p-magd 0 --p-plan 0.5
magd --p-magd 0.5
magd-plans --p-magd 0.5 --p-plan 0.5
END
each_seed <<< "toy base-on-hard base --data hard"
