"""The toy world: drawn scenes whose edits can be judged exactly."""
