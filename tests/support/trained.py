"""A network that is trained for an epoch on twelve identities, by the launcher, as a user would train it."""

from toy_data import write_images

from torchreid_ext.cli.train import main

OPTIONS = {
    "use_gpu": False, "model.name": "osnet_x0_25", "model.pretrained": False, "data.height": 32, "data.width": 16,
    "data.workers": 0, "loss.name": "drsl", "train.batch_size": 8, "train.max_epoch": 1,
    "sampler.train_sampler": "RandomIdentitySampler", "datasets.listed.csv": "list.csv", "test.batch_size": 5,
    "test.dist_metric": "cosine", "data.norm_mean": [0.4, 0.5, 0.6],
}  # fmt: skip


def train(folder, **options):
    """Draws the images below ``folder`` and trains; returns the checkpoint."""
    # Two of the drawn persons are one identity of the test, so that a search by colour makes mistakes.
    rows = [
        [
            path,
            str(pid if pid < 6 else 6 + pid % 3),
            str(camid),
            "train" if pid < 6 else "gallery" if camid else "query",
        ]
        for path, pid, camid in write_images(folder / "images")
    ]
    (folder / "list.csv").write_text("\n".join(",".join(row) for row in [["path", "pid", "camid", "split"], *rows]))
    options = OPTIONS | {"data.save_dir": folder / "log"} | options
    words = [str(word) for item in options.items() for word in item]
    assert main(["-s", "listed", "-t", "listed", "--root", str(folder), *words]) == 0
    return folder / "log" / "model" / "model-best.pth.tar"
