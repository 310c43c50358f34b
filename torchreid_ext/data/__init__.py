"""Data sets, samplers, and deterministic loading of training batches."""
