"""Training runs of the benchmark: losses, data, settings and results."""
