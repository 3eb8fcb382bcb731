#!/usr/bin/env bash
# Table 3, Figures 6 to 9, Table 5: pause tokens on the four models of table2.sh, against other fillers and other seeds.
source "$(dirname "$0")/study.sh"
printf 'pauses %s\n' plain plans magd magd-plans | each_seed
