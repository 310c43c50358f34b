"""Runs of the launcher on twelve identities, as a user would start them."""

from toy_data import write_images

from torchreid_ext.cli.train import main

OPTIONS = {
    "use_gpu": False, "model.name": "osnet_x0_25", "model.pretrained": False, "data.height": 32, "data.width": 16,
    "data.workers": 0, "loss.name": "drsl", "train.batch_size": 8, "train.max_epoch": 1,
    "sampler.train_sampler": "RandomIdentitySampler",
}  # fmt: skip
SMALL = {"model.name": "squeezenet1_1", "data.height": 64, "data.width": 32}  # soon exported


def csv_data(folder, spoil=lambda rows: rows, identity=str):
    """Draws the images below ``folder`` and lists them, the data set ``listed``; the first six identities train."""
    rows = [
        [path, str(identity(pid)), str(camid), "train" if pid < 6 else "gallery" if camid else "query"]
        for path, pid, camid in write_images(folder / "images")
    ]
    rows = spoil([["path", "pid", "camid", "split"], *rows])
    (folder / "list.csv").write_text("\n".join(",".join(row) for row in rows))


def words(folder, **options):
    """The words of a command line, with a configuration that is quick."""
    options = OPTIONS | {"data.save_dir": folder / "log", "datasets.listed.csv": "list.csv"} | options
    pairs = [str(word) for item in options.items() for word in item]
    return ["-s", "listed", "-t", "listed", "--root", str(folder), *pairs]


def launch(folder, *flags, **options):
    """The exit status of a run."""
    return main([*flags, *words(folder, **options)])


def complaint(capsys, command="drsl-train"):
    """What stands on stderr, if it is one line of ours."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line]
    assert "Traceback" not in err and len(lines) == 1 and lines[0].startswith(f"{command}: "), err
    return lines[0]


def train(folder, **options):
    """Draws the images below ``folder`` and trains for an epoch; returns the checkpoint."""
    # Two of the drawn persons are one identity of the test, so that a search by colour makes mistakes.
    csv_data(folder, identity=lambda pid: pid if pid < 6 else 6 + pid % 3)
    tested = {"test.batch_size": 5, "test.dist_metric": "cosine", "data.norm_mean": [0.4, 0.5, 0.6]}
    assert launch(folder, **tested | options) == 0
    return folder / "log" / "model" / "model-best.pth.tar"
