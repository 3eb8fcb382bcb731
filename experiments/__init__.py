"""The experiments: the scripts that run them, their results, the tables and figures, and the benchmark."""
