"""Individual animals from a frame in the format of wildlife-datasets: columns ``identity`` and ``path``.

``python examples/wildlife.py`` draws animals whose coats differ, trains on two thirds of them and looks the others up.
``python examples/wildlife.py --dataset MacaqueFaces --root DATA`` takes a set of the package wildlife-datasets instead.
It needs pandas and torchvision, which ``pip install -e ".[reid,benchmark]"`` installs.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn
from torchvision import transforms

from pml_drsl import DRSLoss
from pml_drsl.evaluation.calculator import ReIDAccuracyCalculator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", help="a class of wildlife_datasets.datasets")
parser.add_argument("--root", help="folder of the data set")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()
rng = np.random.default_rng(0)
torch.manual_seed(0)


def draw(folder: Path, animals: int = 48, photos: int = 8) -> pd.DataFrame:
    """Animals with spots in places of their own; each photo from a little further left or right, in another light."""
    rows = []
    for animal in range(animals):
        spots = rng.uniform(10, 54, (8, 2))
        for photo in range(photos):
            image = Image.new("RGB", (64, 64), tuple(rng.integers(100, 256, 3).tolist()))
            for x, y in spots + rng.normal(0, 4, 2):
                ImageDraw.Draw(image).ellipse([x - 4, y - 4, x + 4, y + 4], fill=(50, 35, 25))
            image.save(folder / f"{animal:02}_{photo}.png")
            rows.append({"image_id": len(rows), "identity": f"animal {animal:02}", "path": f"{animal:02}_{photo}.png"})
    return pd.DataFrame(rows)


if args.dataset:
    from wildlife_datasets import datasets

    root = Path(args.root)
    frame = getattr(datasets, args.dataset)(str(root)).df
else:
    root = Path(tempfile.mkdtemp())
    frame = draw(root)

frame = frame[frame["identity"] != "unknown"]
known = rng.permutation(frame["identity"].unique())  # other animals are trained on than are looked up
train_set = torch.tensor(frame["identity"].isin(known[: 2 * len(known) // 3]).tolist())
labels = torch.from_numpy(pd.factorize(frame["identity"])[0])
transform = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()])
images = torch.stack([transform(Image.open(root / path).convert("RGB")) for path in frame["path"]])

channels = [3, 16, 32, 64]
layers = [
    nn.Sequential(nn.Conv2d(below, above, 3, 2, 1), nn.BatchNorm2d(above), nn.ReLU())
    for below, above in itertools.pairwise(channels)
]
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 8 * 8, 64))
loss_fn, optimizer = DRSLoss(), torch.optim.Adam(model.parameters(), lr=1e-3)


def report(when: str) -> None:
    """Looks every photo of the animals that were not trained on up among their other photos."""
    model.eval()
    with torch.no_grad():
        embeddings = model(images[~train_set])
    model.train()
    scores = ReIDAccuracyCalculator(metric="cosine").get_accuracy(embeddings, labels[~train_set])
    print(f"{when}: mAP {scores['mAP']:.1%}, rank-1 {scores['rank_1']:.1%}")


report("before")
train_images, train_labels = images[train_set], labels[train_set]
batch_size = min(32, 4 * len(train_labels.unique()))
sampler = MPerClassSampler(train_labels, 4, batch_size, length_before_new_iter=args.steps * batch_size)
dataset = torch.utils.data.TensorDataset(train_images, train_labels)
for batch, identities in torch.utils.data.DataLoader(dataset, batch_size, sampler=sampler):
    loss = loss_fn(model(batch), identities)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
report("after")
