"""Plain pytorch-metric-learning on a folder of images, FOLDER/IDENTITY/*.jpg: python examples/pml_loop.py FOLDER.

It needs torchvision, which ``pip install -e ".[reid]"`` installs.
"""

import argparse
import os

import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from torchvision import datasets, models, transforms

from pml_drsl import DRSLoss, RankViolationMiner

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--size", type=int, default=64, help="height and width of the images (%(default)s)")
args = parser.parse_args()


def is_photo(path: str) -> bool:  # and no hidden file, such as ._1.jpg of a Mac
    return path.lower().endswith(datasets.folder.IMG_EXTENSIONS) and not os.path.basename(path).startswith(".")


transform = transforms.Compose([transforms.Resize((args.size, args.size)), transforms.ToTensor()])
images = datasets.ImageFolder(args.folder, transform, is_valid_file=is_photo, allow_empty=True)
# A ranking needs several images of each identity in a batch: here 4 of each of 16.
batch_size = min(64, 4 * len(set(images.targets)))
sampler = MPerClassSampler(
    images.targets, m=4, batch_size=batch_size, length_before_new_iter=max(len(images), batch_size)
)
loader = torch.utils.data.DataLoader(images, batch_size, sampler=sampler, drop_last=True)

model = models.resnet18(num_classes=128)  # weights="DEFAULT" with num_classes=1000 starts from ImageNet
loss_fn, miner = DRSLoss(), RankViolationMiner(margin=0.2)  # the miner may be left out
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

for epoch in range(1, args.epochs + 1):
    losses = []
    for batch, labels in loader:
        embeddings = model(batch)
        loss = loss_fn(embeddings, labels, miner(embeddings, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")
