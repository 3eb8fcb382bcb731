#!/usr/bin/env bash
# Which corruption does the work? Only noise is `plain` of table2.sh, both is `magd`; here only masking, and masking before the noise.
source "$(dirname "$0")/study.sh"
finetunes <<'END'
only-mask --corruption mask
mask-then-noise --corruption mask-noise --mask-token zero
END
