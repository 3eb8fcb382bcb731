#!/usr/bin/env bash
# Tables 6 and 7: how much is masked, when, how often and with what. After table2.sh, whose `plain` and `magd` they are compared with.
source "$(dirname "$0")/study.sh"
finetunes <<'END'
rate-0.5 --r-mask 0.5
tau-0.5 --tau 0.5
tau-0 --tau 0
p-magd-1 --p-magd 1
zero-mask --mask-token zero
END
