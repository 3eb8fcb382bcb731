#!/usr/bin/env bash
# Does masking help more, or less, with more steps and in larger models? 100 to 800 steps of fine-tuning; widths 64, 128 and 192.
source "$(dirname "$0")/study.sh"
finetunes <<'END'
plain-steps-100 --p-magd 0 --steps 100
magd-steps-100 --p-magd 0.5 --steps 100
plain-steps-800 --p-magd 0 --steps 800
magd-steps-800 --p-magd 0.5 --steps 800
END
for size in "64 2 128" "192 6 384"; do
    read -r width heads mlp <<< "$size"
    sizes="--width $width --heads $heads --mlp $mlp"
    arms $sizes <<< "base-width-$width --data simple --steps 2000 --p-magd 0"
    base=base-width-$width finetunes $sizes <<END
plain-width-$width --p-magd 0
magd-width-$width --p-magd 0.5
END
done
