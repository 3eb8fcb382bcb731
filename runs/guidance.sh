#!/usr/bin/env bash
# Guidance everywhere, or only in the first or the second half of the way from noise to image, on the plain models of table2.sh.
source "$(dirname "$0")/study.sh"
each_seed <<'END'
toy guidance-none plain
toy guidance-all plain --text-scale 2.5 --image-scale 1.5
toy guidance-early plain --text-scale 2.5 --image-scale 1.5 --guidance-interval 0,0.5
toy guidance-late plain --text-scale 2.5 --image-scale 1.5 --guidance-interval 0.5,1
END
