"""The command ``drsl-benchmark``: experiments that compare losses, and their report."""
