"""Joins the demo's pages of rankings, before and after training, into the picture of the README.

Usage: python tests/support/demo_picture.py LOG_FOLDER OUTPUT.png
"""

import sys
from pathlib import Path

from PIL import Image

HEADING = 64  # pixels at the top of a page
PAGE = "ranking_synthetic_pedestrians.png"


def join(log: Path, output: Path) -> None:
    """Writes both pages one above the other, at half the size, in 128 colours."""
    pages = [Image.open(path) for path in (log / "untrained" / PAGE, log / PAGE)]
    pages = [page.crop((0, HEADING, page.width, page.height)) for page in pages]
    width = max(page.width for page in pages)
    joined = Image.new("RGB", (width, sum(page.height for page in pages) + 8), (34, 34, 34))
    joined.paste(pages[0], (0, 0))
    joined.paste(pages[1], (0, pages[0].height + 8))
    joined.reduce(2).quantize(128).save(output, optimize=True)


if __name__ == "__main__":
    join(Path(sys.argv[1]), Path(sys.argv[2]))
