"""DRSL in a script of torchreid, on a folder of photos FOLDER/PERSON/*: python examples/torchreid_script.py FOLDER.

The lines that differ from a script without DRSL are marked.
"""

import argparse
from pathlib import Path

import torchreid

import torchreid_ext  # noqa: F401 - marked: adds ImageDRSLEngine to torchreid.engine
from pml_drsl import DRSLoss  # marked
from torchreid_ext.images import is_image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--save-dir", default="log/torchreid_script")
args = parser.parse_args()


class Photos(torchreid.data.ImageDataset):
    """Trains on every other person. Of each remaining person, the first, third, fifth... photo is a query, and the
    others are the gallery."""

    def __init__(self, root="", **kwargs):
        folders = sorted(folder for folder in Path(root).iterdir() if folder.is_dir())
        people = [sorted(path for path in folder.glob("[!.]*") if is_image(path.name)) for folder in folders]
        people = [paths for paths in people if paths]  # The numbers of the people must have no gap.
        train = [(str(path), pid, 0) for pid, paths in enumerate(people[::2]) for path in paths]
        test = [(str(path), pid, shot % 2) for pid, paths in enumerate(people[1::2]) for shot, path in enumerate(paths)]
        super().__init__(train, [row for row in test if row[2] == 0], [row for row in test if row[2] == 1], **kwargs)


torchreid.data.register_image_dataset("photos", Photos)
# More workers need `if __name__ == "__main__":` around what follows on macOS, Windows, and Linux from Python 3.14 on.
datamanager = torchreid.data.ImageDataManager(
    root=args.folder, sources="photos", height=128, width=64, workers=0, use_gpu=False,
    batch_size_train=args.batch_size,
    train_sampler="RandomIdentitySampler", num_instances=4,  # marked: several photos of each person
)  # fmt: skip
model = torchreid.models.build_model(
    "osnet_x0_25", datamanager.num_train_pids, pretrained=False, loss="triplet"  # marked: features as well as logits
)  # fmt: skip
optimizer = torchreid.optim.build_optimizer(model, lr=0.003)
scheduler = torchreid.optim.build_lr_scheduler(optimizer, lr_scheduler="cosine", max_epoch=args.epochs)
engine = torchreid.engine.ImageDRSLEngine(  # marked
    datamanager, model, optimizer, DRSLoss(), scheduler=scheduler, use_gpu=False
)
results = engine.run(args.save_dir, max_epoch=args.epochs, dist_metric="cosine", print_freq=10)
print(f"mAP {results['photos'].mAP:.1%}")
