"""The guide, docs/torchreid.md, and the tables of keys in docs/keys.md and docs/data.md, against the code."""

import re
from pathlib import Path

import pytest
import torchreid
import torchreid_keys
from key_table import ADDED, TABLES, with_table
from toy_data import make_image_manager

from torchreid_ext.config.keys import KEYS, SET_KEYS
from torchreid_ext.engine import criteria

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


def test_the_script_trains(tmp_path):
    before, after, weights = (
        *re.findall(r"```python\n(.*?)```", GUIDE, re.S),
        re.search(r"`(optimizer\.add_param_group.*?\))`", GUIDE)[1],
    )
    assert "ImageSoftmaxEngine" in before
    assert len(after.strip().splitlines()) == 5
    names = {"torchreid": torchreid, "datamanager": make_image_manager(tmp_path), "scheduler": None}
    small = {'"osnet_x1_0"': '"osnet_x0_25"', 'loss="triplet")': 'loss="triplet", pretrained=False)'}
    for old, new in small.items():
        assert old in after
        after = after.replace(old, new)
    *lines, engine = after.strip().splitlines()
    exec("\n".join(lines), names)
    names["optimizer"] = torchreid.optim.build_optimizer(names["model"])
    exec(f"{engine}\n", names)
    assert names["engine"].run(str(tmp_path / "log"), max_epoch=1)
    names["criterion"] = criteria.build(
        "loss", {"name": "ArcFaceLoss"}, criteria.TABLES["loss"], {"num_classes": 6, "embedding_size": 512}
    )
    exec(f"{weights}\n{engine}", names)
    assert names["optimizer"].param_groups[-1]["lr"] == 0.01


def test_every_config_it_names_exists():
    named = set(re.findall(r"configs/[a-z0-9_]+\.yaml", GUIDE))
    assert named and all((Path(__file__).parents[2] / path).is_file() for path in named)
