"""Measurements of the time and memory of the loss and of the evaluation."""
