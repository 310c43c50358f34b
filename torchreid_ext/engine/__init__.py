"""Engines: what happens in a step of training."""
