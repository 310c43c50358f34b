"""Writes the table of the config keys that torchreid does not have into the guide (``python -m`` this module)."""

from __future__ import annotations

import sys
from pathlib import Path

from torchreid_ext.config.keys import ADDED

GUIDE = "docs/torchreid.md"
HEAD = "| Key | Default | What it is for |\n|---|---|---|\n"


def table() -> str:
    """The table in Markdown, without its head."""
    rows = (f"| `{key}` | `{entry.default!r}` | {entry.text.replace('|', '/')} |" for key, entry in ADDED.items())
    return "".join(f"{row}\n" for row in rows)


def with_table(guide: str) -> str:
    """A guide's text with the rows of its table of keys replaced."""
    before, _, after = guide.partition(HEAD)
    rest = after.splitlines(keepends=True)
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    return f"{before}{HEAD}{table()}{''.join(rest)}"


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else GUIDE)
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
