"""Processes, random number generators and signals."""
