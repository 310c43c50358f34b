"""The options of a run, the single source of their config keys, defaults, help and documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchreid_ext.evaluation.tester import EvaluationOptions
from torchreid_ext.runtime.options import documented, option


@documented
@dataclass(frozen=True, kw_only=True)
class RunOptions(EvaluationOptions):
    """Options of ``engine.run``; each is also a config key."""

    # fmt: off
    save_dir: str = option(
        "data.save_dir", "log", "folder for checkpoints, logs and results", on_resume="free", scores=False)
    max_epoch: int = option("train.max_epoch", 0, "epochs to train", least=0, config_default=60)
    start_epoch: int = option("train.start_epoch", 0, "epoch to start from", least=0)
    fixbase_epoch: int = option("train.fixbase_epoch", 0, "epochs at the start that train only open_layers", least=0)
    open_layers: str | list[str] | None = option(
        "train.open_layers", None, "layers trained in the first fixbase_epoch epochs", config_default=["classifier"])
    print_freq: int = option("train.print_freq", 10, "batches between two lines of the log", least=1, config_default=20,
        on_resume="free", scores=False)
    amp: str = option("train.amp", "off", choices=("off", "bf16", "fp16"),
        text="precision of the network in training: off, bf16 or fp16 (with scaled gradients)")
    compiled: bool = option("train.compile", False, "compile the network for training with torch.compile")
    channels_last: str | bool = option("train.channels_last", "auto", choices=("auto", True, False),
        text="memory format channels_last, in training and tests: True, False, or auto: where it is faster")
    chunk_size: int = option("train.chunk_size", 0,
        "images that the network takes at a time in each process; memory then allows a larger train.batch_size, the "
        "gradients are those of the whole batch, and there is a second forward pass; 0: all at once", least=0)
    skip_nonfinite: bool = option(
        "train.skip_nonfinite", False, "skip a step whose loss is NaN or infinite, instead of stopping")
    checkpoint_freq: int = option("train.checkpoint_freq", 1, "epochs between checkpoints", least=1, scores=False)
    keep_checkpoints: int = option("train.keep_checkpoints", 3,
        "checkpoints to keep, besides the last and the best; 0 keeps all", least=0, scores=False)
    test_only: bool = option("test.evaluate", False, "only test", on_resume="free")
    eval_freq: int = option(
        "test.eval_freq", -1, "epochs between tests; -1 tests only at the end", least=-1, scores=False)
    start_eval: int = option("test.start_eval", 0, "first epoch to test after", least=0, scores=False)

    # fmt: on

    def last_test(self) -> dict[str, Any]:
        """The arguments of the test at the end of the run, which re-ranks only in a run that trains nothing."""
        return self.arguments(EvaluationOptions) | {"rerank": self.rerank and self.test_only}

    def test_between(self) -> dict[str, Any]:
        """The arguments of a test during training, which draws nothing."""
        return self.last_test() | {"visrank": False, "picture": 0}
