"""Writes the table of keys that torchreid does not have into docs/keys.md: ``python tests/support/key_table.py``."""

import inspect
from pathlib import Path

import torchreid

from torchreid_ext.config.keys import KEYS, TORCHREID

_TAKEN = inspect.signature(torchreid.engine.Engine.run).parameters
ADDED = [key for key, entry in KEYS.items() if key not in TORCHREID and entry.name not in _TAKEN]
PAGE = Path(__file__).parents[2] / "docs" / "keys.md"
HEAD = "| Key | Default | What it is for |\n|---|---|---|\n"


def with_table(page: str) -> str:
    """A page's text with the rows of its table of keys replaced."""
    rows = (f"| `{key}` | `{KEYS[key].default!r}` | {KEYS[key].text.replace('|', '/')} |\n" for key in ADDED)
    before, _, after = page.partition(HEAD)
    rest = after.splitlines(keepends=True)
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    return f"{before}{HEAD}{''.join(rows)}{''.join(rest)}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
