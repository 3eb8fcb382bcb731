#!/usr/bin/env bash
# Velocity, noise or the clean image as what the network predicts: trained from scratch on the data of the base model.
source "$(dirname "$0")/study.sh"
arms --data simple --steps 800 --p-magd 0 <<'END'
predict-velocity --prediction velocity
predict-noise --prediction noise
predict-x --prediction x
END
