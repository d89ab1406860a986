"""Scripts that run other programs; each in the environment that `benchmarks.work.environment` makes for it."""
