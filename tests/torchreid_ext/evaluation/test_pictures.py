"""The page of ranked results shows the right images at the right places, in the right colours."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from torchreid_ext.evaluation.page import Found, Picture, Ranking
from torchreid_ext.evaluation.pictures import FRAMES, ranking_picture

# Smoothed grey text does not contain these colours.
BLUE, OLIVE, PINK = (20, 40, 220), (120, 120, 20), (250, 120, 200)
RIGHT, WRONG = FRAMES["right"], FRAMES["wrong"]


@pytest.fixture
def images(tmp_path: Path) -> dict[tuple[int, int, int], str]:
    paths = {}
    for number, colour in enumerate((BLUE, OLIVE, PINK)):
        paths[colour] = str(tmp_path / f"{number}.png")
        Image.new("RGB", (32, 64), colour).save(paths[colour])
    return paths


def ranked(query: str, *matches: tuple[str | list[str], float, str]) -> Ranking:
    found = [Found(Picture(files), far, mark, rank) for rank, (files, far, mark) in enumerate(matches, 1)]
    return Ranking(Picture(query), found)


def columns(page: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    """The x coordinates of all pixels of this colour."""
    pixels = page.load()
    assert pixels is not None
    return [x for x in range(page.width) for y in range(page.height) if pixels[x, y] == colour]


def test_query_stands_left_of_the_gallery_in_order(images: dict[tuple[int, int, int], str]) -> None:
    row = ranked(images[BLUE], (images[OLIVE], 0.25, "right"), (images[PINK], 1.5, "wrong"))
    page = ranking_picture([row], "title")
    assert max(columns(page, BLUE)) < min(columns(page, OLIVE)) <= max(columns(page, OLIVE)) < min(columns(page, PINK))
    # Each frame surrounds its own image.
    assert min(columns(page, RIGHT)) < min(columns(page, OLIVE))
    assert max(columns(page, RIGHT)) < min(columns(page, PINK))
    assert max(columns(page, OLIVE)) < min(columns(page, WRONG)) < min(columns(page, PINK))
    assert max(columns(page, WRONG)) > max(columns(page, PINK))


def test_right_and_wrong_differ_even_without_colour(images: dict[tuple[int, int, int], str]) -> None:
    shapes = []
    for mark, colour in (("right", RIGHT), ("wrong", WRONG)):
        page = ranking_picture([ranked(images[BLUE], (images[OLIVE], 0.5, mark))], "title")
        found = {(x, y) for x in range(page.width) for y in range(page.height) if page.getpixel((x, y)) == colour}
        shapes.append(found)
    assert shapes[0] != shapes[1]


def test_rank_and_distance_and_title_are_written(images: dict[tuple[int, int, int], str]) -> None:
    def page(title: str, distance: float) -> Image.Image:
        return ranking_picture([ranked(images[BLUE], (images[OLIVE], distance, "right"))], title)

    assert page("one", 0.1).tobytes() != page("two", 0.1).tobytes()
    for distance in (0.1, 12345.6788):  # Features that are not normalised have such distances.
        assert page("one", distance).tobytes() != page("one", distance + 0.0001).tobytes()
    long, longer = page("word " * 60, 0.1), page("word " * 90, 0.1)
    assert long.size == page("one", 0.1).size and long.tobytes() == longer.tobytes()


def test_a_row_per_query_and_unequal_galleries(images: dict[tuple[int, int, int], str]) -> None:
    full = ranked(images[BLUE], *[(images[OLIVE], 0.1, "right")] * 5)
    empty = ranked(images[PINK])
    one, two = ranking_picture([full], ""), ranking_picture([full, empty], "")
    assert two.width == one.width and two.height > 1.7 * (one.height - 100)
    assert columns(two, PINK)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        ranking_picture([], "title")


def test_junk_has_no_colour(images: dict[tuple[int, int, int], str]) -> None:
    row = ranked(images[BLUE], (images[OLIVE], 0.1, "junk"), (images[PINK], 0.2, "wrong"))
    page = ranking_picture([row], "title")
    assert not columns(page, OLIVE)
    assert not columns(page, RIGHT)
    assert min(columns(page, WRONG)) < min(columns(page, PINK))


def test_a_tracklet_shows_images_from_its_whole_length(images: dict[tuple[int, int, int], str]) -> None:
    tracklet = [images[BLUE]] * 5 + [images[OLIVE]] * 5 + [images[PINK]] * 10
    page = ranking_picture([ranked(images[BLUE], (tracklet, 0.1, "right"))], "title")
    quarter = len(columns(page, PINK)) / 2
    assert len(columns(page, OLIVE)) == quarter > 100
