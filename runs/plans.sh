#!/usr/bin/env bash
# What if the models that learned with plans get one for each edit? After table2.sh.
source "$(dirname "$0")/study.sh"
each_seed <<'END'
toy plans-not-given plans
toy plans-given plans --plans
toy magd-plans-not-given magd-plans
toy magd-plans-given magd-plans --plans
END
