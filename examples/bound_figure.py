"""Draws docs/bound.svg: what temperature, bound and power do to one pair of a positive and a negative.

``python examples/bound_figure.py [FILE]``
"""

import sys

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot

pyplot.rcParams |= {
    "svg.hashsalt": "bound",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def smooth_count(x: np.ndarray, temperature: float) -> np.ndarray:
    """G(x) = sigmoid(x / temperature): how much of a false positive a negative is."""
    return 1 / (1 + np.exp(-x / temperature))


def bound_of_count(x: np.ndarray, temperature: float) -> np.ndarray:
    """B(x) = log2(1 + exp(x / temperature)), which is never below G(x)."""
    return np.logaddexp2(0, x / temperature / np.log(2))


def definition(x: np.ndarray, temperature: float) -> np.ndarray:
    """The error of a positive with one negative, ``bound_power=None``; x is how far it is behind the negative."""
    count = smooth_count(x, temperature)
    return count / (1 + count)


def bound(x: np.ndarray, temperature: float, power: float) -> np.ndarray:
    """Its upper bound, ``bound_power=power``."""
    return np.log1p(bound_of_count(x, temperature) ** power) / power


x = np.linspace(-1, 1, 201)
figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
for temperature in (0.02, 0.05, 0.2):
    left.plot(x, smooth_count(x, temperature), label=f"G, {temperature}")
left.plot(x, bound_of_count(x, 0.05), "k--", label="B, 0.05")
left.set(title="what a negative counts", ylim=(0, 2))
for power in (1.0, 0.3, 0.1):
    middle.plot(x, bound(x, 0.05, power) - bound(x[0], 0.05, power), label=f"bound_power {power}")
    right.plot(x, np.gradient(bound(x, 0.05, power), x))
middle.plot(x, definition(x, 0.05), "k:", label="bound_power None")
right.plot(x, np.gradient(definition(x, 0.05), x), "k:")
middle.set(title="the loss, above its value at -1", ylim=(-0.4, 11))
right.set(title="its pull: the derivative of the loss")
for axes in (left, middle, right):
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set_xlabel("how far the positive is behind the negative")
left.legend(frameon=False, fontsize=8, loc="upper right", title="temperature", title_fontsize=8)
middle.legend(frameon=False, fontsize=8, loc="upper left")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "docs/bound.svg", metadata={"Date": None})
