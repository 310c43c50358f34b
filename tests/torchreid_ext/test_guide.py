"""The guide, docs/torchreid.md, and the tables of keys in docs/keys.md and docs/data.md, against the code."""

import re
from pathlib import Path

import pytest
import torchreid
import torchreid_keys
from key_table import ADDED, TABLES, with_table
from pytorch_metric_learning.losses import ArcFaceLoss
from toy_data import make_image_manager

from torchreid_ext.config.keys import KEYS, SET_KEYS

GUIDE = (Path(__file__).parents[2] / "docs" / "torchreid.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.stem)
def test_a_table_of_keys_is_the_one_that_the_code_writes(page):
    """To write it anew: python tests/support/key_table.py."""
    text = page.read_text(encoding="utf-8")
    assert with_table(page) == text
    assert all(f"\n| `{key}` |" in text for key in TABLES[page][1])


def test_the_table_has_the_keys_that_torchreid_does_not_have():
    assert [*ADDED] == [key for key in KEYS if key not in torchreid_keys.names()]
    assert all(entry.text for entry in (KEYS | SET_KEYS).values())


def test_the_optimizer_gets_the_weights_of_a_loss_as_it_says(tmp_path):
    model = torchreid.models.build_model("osnet_x0_25", 6, loss="triplet", pretrained=False)
    criterion, optimizer = ArcFaceLoss(6, 512), torchreid.optim.build_optimizer(model)
    exec(re.search(r"`(optimizer\.add_param_group.*?\))`", GUIDE)[1], {"optimizer": optimizer, "criterion": criterion})
    torchreid.engine.ImagePMLEngine(make_image_manager(tmp_path), model, optimizer, criterion)
    assert optimizer.param_groups[-1]["lr"] == 0.01


def test_every_config_that_it_names_exists_and_it_counts_the_networks():
    named = set(re.findall(r"configs/[a-z0-9_]+\.yaml", GUIDE))
    assert named and all((Path(__file__).parents[2] / path).is_file() for path in named)
    assert f"All {len(vars(torchreid.models)['__model_factory'])} networks" in GUIDE
