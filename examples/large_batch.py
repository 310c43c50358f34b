"""One ranking over a batch that does not fit in memory: the network sees a chunk of it at a time.

``python examples/large_batch.py`` compares its gradient with that of the whole batch, on random images.
"""

import argparse
import copy

import torch
from torch import nn

from pml_drsl import DRSLoss, LargeBatch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--batch-size", type=int, default=512)
parser.add_argument("--chunk-size", type=int, default=32, help="images whose activations are in memory at once")
args = parser.parse_args()

torch.manual_seed(0)
images = torch.rand(args.batch_size, 3, 32, 32).double()  # so that rounding cannot be taken for a difference
labels = torch.arange(args.batch_size) // 4
network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 64))
network.double()

whole = copy.deepcopy(network)
loss = DRSLoss()(whole(images), labels)
loss.backward()

large_batch = LargeBatch(network, DRSLoss(), args.chunk_size)
chunked_loss = large_batch(images, labels)
chunked_loss.backward()

# What accumulating the gradients of small batches gives instead: many small rankings are not one large one.
small = copy.deepcopy(whole)
small.zero_grad()
for part, their_labels in zip(images.split(args.chunk_size), labels.split(args.chunk_size), strict=True):
    (DRSLoss()(small(part), their_labels) * len(part) / len(images)).backward()


def difference(other: torch.nn.Module) -> float:
    """The distance of a network's gradient from that of the whole batch, as a share of the latter's length."""
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (whole, other)]
    return ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()


print(f"loss of the whole batch {loss.item():.6f}, in chunks {chunked_loss.item():.6f}")
print(f"difference of the gradient: in chunks {difference(network):.1e}, from small batches {difference(small):.1e}")
