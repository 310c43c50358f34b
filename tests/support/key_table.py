"""Writes the tables of keys in docs/keys.md and of a data set's options in docs/data.md:
``python tests/support/key_table.py``."""

import inspect
from pathlib import Path

import torchreid

from torchreid_ext.config.keys import KEYS, SET_KEYS, TORCHREID

_DOCS = Path(__file__).parents[2] / "docs"
_TAKEN = inspect.signature(torchreid.engine.Engine.run).parameters
ADDED = {key: entry for key, entry in KEYS.items() if key not in TORCHREID and entry.name not in _TAKEN}
OPTIONS = {key.removeprefix("datasets.NAME."): entry for key, entry in SET_KEYS.items()}
TABLES = {
    _DOCS / "keys.md": ("| Key | Default | What it is for |\n|---|---|---|\n", ADDED),
    _DOCS / "data.md": ("| Option | Default | Meaning |\n|---|---|---|\n", OPTIONS),
}
"""By page: the head of its table, and what the table holds."""


def with_table(page: Path) -> str:
    """A page's text with the rows of its table replaced."""
    head, entries = TABLES[page]
    rows = (f"| `{key}` | `{entry.default!r}` | {entry.text.replace('|', '/')} |\n" for key, entry in entries.items())
    before, _, after = page.read_text(encoding="utf-8").partition(head)
    rest = after.splitlines(keepends=True)
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    return f"{before}{head}{''.join(rows)}{''.join(rest)}"


if __name__ == "__main__":
    for path in TABLES:
        path.write_text(with_table(path), encoding="utf-8")
