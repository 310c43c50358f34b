"""Checkpoints: atomic files, the state of a run, and the search for the checkpoint to resume from."""
