"""The full-scale run: sharding over several GPUs, and what a run costs in arithmetic and memory."""
