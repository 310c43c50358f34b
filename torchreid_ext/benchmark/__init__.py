"""Compares losses: a grid of configuration files, losses and seeds, trained by ``drsl-train``, and its report."""
