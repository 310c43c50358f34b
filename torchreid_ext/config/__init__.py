"""Configuration: the keys, their checks, and the objects that a configuration describes."""
