"""Draws images of pedestrians, as seen by different cameras, with the random generators that the caller passes.

The cameras change an image so much that an untrained network retrieves images of the same camera. It must learn the
clothing to retrieve the person.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

HEIGHT, WIDTH = 128, 64

# Images are drawn at twice their size and then reduced, which smooths the edges.
_CANVAS = (2 * WIDTH, 2 * HEIGHT)
_SCENE = (4 * WIDTH, 3 * HEIGHT)
SKIN: tuple[Colour, ...] = ((244, 208, 177), (224, 172, 130), (190, 134, 90), (134, 88, 56), (84, 56, 40))
HAIR: tuple[Colour, ...] = ((24, 20, 18), (74, 48, 28), (140, 92, 44), (216, 182, 104), (150, 150, 150), (156, 56, 30))
CLOTH: tuple[Colour, ...] = (
    (28, 28, 32), (238, 238, 232), (128, 130, 134), (196, 36, 40), (238, 128, 34), (240, 208, 60), (52, 138, 66),
    (30, 140, 148), (92, 164, 226), (40, 72, 168), (116, 62, 152), (236, 136, 176), (122, 78, 46), (206, 180, 138),
)  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """The changes that a camera makes to every image."""

    gain: tuple[float, float, float]  # factors of red, green and blue (the colour cast)
    gamma: float  # exponent of the tone curve; above 1 makes the image darker
    contrast: float  # factor about mid grey
    facing: str  # the side that people usually show: front, side or back
    lean: float  # horizontal shift from feet to head, as a fraction of the body height
    scale: float  # body height as a fraction of the image height
    walls: Colour
    ground: Colour
    blur: float  # radius in pixels of the final image
    noise: float  # standard deviation on the scale 0..255
    mirror: bool  # whether people walk in the other direction


CAMERAS: tuple[Camera, ...] = (
    Camera((1.00, 1.00, 1.00), 1.00, 1.00, "front", 0.00, 0.90, (136, 134, 128), (126, 124, 120), 0.3, 4.0, False),
    Camera((1.06, 1.00, 0.92), 1.02, 0.98, "back", 0.05, 0.84, (124, 116, 110), (132, 126, 116), 0.5, 6.0, True),
    Camera((0.93, 0.99, 1.06), 0.99, 0.97, "side", -0.05, 0.94, (120, 124, 128), (118, 118, 116), 0.4, 6.0, False),
    Camera((0.93, 0.94, 0.92), 1.08, 1.00, "front", 0.08, 0.80, (112, 112, 112), (110, 110, 108), 0.8, 9.0, True),
    Camera((1.02, 1.03, 1.02), 0.93, 0.92, "side", -0.03, 0.88, (146, 144, 142), (142, 140, 136), 0.6, 5.0, True),
    Camera((0.96, 1.04, 0.96), 1.00, 0.99, "back", 0.02, 0.97, (118, 124, 112), (124, 130, 112), 0.5, 7.0, False),
)


def _pick(rng: np.random.Generator, choices: tuple[Any, ...]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _vary(rng: np.random.Generator, colour: Colour, spread: int) -> Colour:
    red, green, blue = np.clip(np.asarray(colour) + rng.integers(-spread, spread + 1, 3), 0, 255).tolist()
    return red, green, blue


def make_person(rng: np.random.Generator) -> SimpleNamespace:
    """Draws the look of a random identity, which is the same for every camera."""
    top, accent, bottom, bag_colour = (_vary(rng, _pick(rng, CLOTH), 14) for _ in range(4))
    return SimpleNamespace(
        skin=_pick(rng, SKIN),
        hair=_pick(rng, HAIR),
        hair_style=_pick(rng, ("short", "short", "long", "bald", "cap", "bun")),
        build=float(rng.uniform(0.82, 1.3)),
        height=float(rng.uniform(0.88, 1.0)),
        top=top,
        accent=accent,
        pattern=_pick(rng, ("plain", "plain", "hoops", "stripes", "checks", "logo", "jacket")),
        long_sleeves=bool(rng.random() < 0.6),
        bottom=bottom,
        bottom_kind=_pick(rng, ("trousers", "trousers", "shorts", "skirt")),
        shoes=_vary(rng, _pick(rng, CLOTH), 14),
        bag=_pick(rng, ("none", "none", "backpack", "shoulder", "hand")),
        bag_colour=bag_colour,
    )


class _Pen:
    """Draws in coordinates of the body: x from -0.5 to 0.5 about the spine, y from 0 (head) to 1 (feet)."""

    def __init__(self, canvas: Image.Image, centre: float, top: float, height: float, lean: float, mirror: bool):
        self.canvas, self.draw = canvas, ImageDraw.Draw(canvas)
        self.centre, self.top, self.height, self.lean = centre, top, height, lean
        self.direction = -1.0 if mirror else 1.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.centre + self.height * (self.direction * x + self.lean * (1.0 - y)), self.top + self.height * y

    def polygon(self, points: list[tuple[float, float]], colour: Any) -> None:
        self.draw.polygon([self.at(*point) for point in points], fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Any) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Any) -> None:
        (cx, cy), rx, ry = self.at(x, y), rx * self.height, ry * self.height
        self.draw.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=colour)

    def limb(self, points: list[tuple[float, float]], thickness: float, colour: Any) -> None:
        for x, y in points:
            self.oval(x, y, thickness / 2, thickness / 2, colour)
        width = max(1, round(thickness * self.height))
        self.draw.line([self.at(*point) for point in points], fill=colour, width=width)

    def on(self, canvas: Image.Image) -> _Pen:
        return _Pen(canvas, self.centre, self.top, self.height, self.lean, self.direction < 0)


def _draw_fabric(pen: _Pen, person: SimpleNamespace, facing: str) -> None:
    """Covers the whole canvas with the cloth of the upper garment. The caller cuts the garment out of it."""
    pen.draw.rectangle((0, 0, *_CANVAS), fill=person.top)
    if person.pattern in ("hoops", "checks"):
        for row in range(5):
            pen.box(-0.5, 0.2 + 0.065 * row, 0.5, 0.228 + 0.065 * row, person.accent)
    if person.pattern in ("stripes", "checks"):
        for column in range(-4, 5):
            pen.box(0.055 * column - 0.011, 0.1, 0.055 * column + 0.011, 0.6, person.accent)
    if person.pattern == "logo" and facing != "back":
        pen.oval(0.03 if facing == "side" else 0.0, 0.28, 0.052, 0.052, person.accent)
    if person.pattern == "jacket" and facing != "back":
        pen.box(-0.032 if facing == "front" else 0.03, 0.15, 0.032 if facing == "front" else 0.2, 0.52, person.accent)
    if person.pattern == "jacket":
        pen.box(-0.5, 0.485, 0.5, 0.54, person.accent)


def _draw_legs(pen: _Pen, person: SimpleNamespace, facing: str, stride: float) -> None:
    spread, width = 0.012 if facing == "side" else 0.055 * person.build, 0.088 * person.build
    for side in (-1, 1):
        hip = (side * spread, 0.5)
        knee = (side * (spread + stride * 0.55) + 0.02, 0.72) if facing == "side" else (side * spread * 1.05, 0.73)
        foot = (side * (spread + stride), 0.95) if facing == "side" else (side * spread * 1.1, 0.95 - side * stride / 9)
        pen.limb([hip, knee, foot], width * 0.78, person.skin)
        pen.oval(foot[0] + (0.02 if facing == "side" else 0.0), foot[1] + 0.025, width * 0.62, 0.024, person.shoes)
        if person.bottom_kind == "trousers":
            pen.limb([hip, knee, (foot[0], foot[1] - 0.015)], width, person.bottom)
        elif person.bottom_kind == "shorts":
            pen.limb([hip, (knee[0] * 0.95, 0.67)], width * 1.12, person.bottom)
    if person.bottom_kind == "skirt":
        half = 0.09 * person.build
        pen.polygon([(-half, 0.46), (half, 0.46), (half * 1.55, 0.7), (-half * 1.55, 0.7)], person.bottom)


def _draw_head(pen: _Pen, person: SimpleNamespace, facing: str) -> None:
    ahead = 0.016 if facing == "side" else 0.0
    pen.box(-0.03 + ahead / 2, 0.1, 0.03 + ahead / 2, 0.19, person.skin)
    if person.hair_style == "long" and facing == "front":
        for side in (-1, 1):
            pen.limb([(side * 0.05, 0.05), (side * 0.062, 0.2)], 0.032, person.hair)
    elif person.hair_style == "long":
        pen.oval(-0.014 if facing == "side" else 0.0, 0.12, 0.068, 0.108, person.hair)
    hairy = person.hair_style != "bald"
    pen.oval(ahead, 0.078, 0.056, 0.074, person.hair if facing == "back" and hairy else person.skin)
    if hairy:
        pen.oval(ahead * 0.3, 0.042, 0.061, 0.046, person.hair)
    if facing == "side" and hairy:
        pen.oval(-0.022, 0.075, 0.038, 0.055, person.hair)
    if person.hair_style == "bun":
        pen.oval(-0.035 if facing == "side" else 0.0, 0.0, 0.034, 0.03, person.hair)
    if person.hair_style == "cap":
        pen.oval(ahead * 0.3, 0.034, 0.066, 0.042, person.accent)
        if facing != "back":
            pen.box(0.0 if facing == "side" else -0.06, 0.04, 0.1 if facing == "side" else 0.06, 0.056, person.accent)


def _draw_person(pen: _Pen, person: SimpleNamespace, facing: str, stride: float) -> None:
    build = person.build * (0.72 if facing == "side" else 1.0)
    shoulder, waist = 0.122 * build, 0.098 * build
    if person.bag == "backpack" and facing != "back":
        x, half = (-shoulder * 1.05, 0.085) if facing == "side" else (0.0, shoulder * 1.12)
        pen.oval(x, 0.3, half, 0.12, person.bag_colour)
    _draw_legs(pen, person, facing, stride)
    fabric, garment = Image.new("RGB", _CANVAS), Image.new("L", _CANVAS)
    _draw_fabric(pen.on(fabric), person, facing)
    cut = pen.on(garment)
    hem = 0.54 if person.pattern == "jacket" else 0.51
    cut.polygon([(-shoulder, 0.185), (-0.04, 0.16), (0.04, 0.16), (shoulder, 0.185), (waist, hem), (-waist, hem)], 255)
    hands = []
    for side in (-1, 1):
        start = (0.0, 0.2) if facing == "side" else (side * shoulder * 0.95, 0.205)
        swing = side * stride * 0.9 if facing == "side" else side * (0.035 + stride / 12)
        elbow, hand = (start[0] + swing * 0.5, 0.36), (start[0] + swing, 0.5)
        pen.limb([start, elbow, hand], 0.042 * person.build, person.skin)
        sleeve = [start, elbow, hand] if person.long_sleeves else [start, (start[0] + swing * 0.3, 0.3)]
        cut.limb(sleeve, 0.06 * person.build, 255)
        hands.append(hand)
    pen.canvas.paste(fabric, mask=garment)
    for x, y in hands:
        pen.oval(x, y + 0.02, 0.024, 0.026, person.skin)
    _draw_head(pen, person, facing)
    if person.bag == "backpack" and facing == "back":
        pen.box(-shoulder * 0.78, 0.19, shoulder * 0.78, 0.42, person.bag_colour)
        pen.oval(0.0, 0.42, shoulder * 0.78, 0.03, person.bag_colour)
    elif person.bag == "backpack" and facing == "front":
        for side in (-1, 1):
            pen.limb([(side * shoulder * 0.66, 0.18), (side * shoulder * 0.6, 0.36)], 0.022, person.bag_colour)
    elif person.bag == "shoulder":
        pen.limb([(-shoulder * 0.7, 0.18), (shoulder * 0.9, 0.46)], 0.016, person.bag_colour)
        pen.box(shoulder * 0.6, 0.44, shoulder * 0.6 + 0.12, 0.57, person.bag_colour)
    elif person.bag == "hand":
        x, y = hands[1]
        pen.box(x - 0.055, y + 0.06, x + 0.055, y + 0.17, person.bag_colour)
        pen.limb([(x - 0.04, y + 0.06), (x, y + 0.02), (x + 0.04, y + 0.06)], 0.012, person.bag_colour)


def draw_scene(rng: np.random.Generator, camera: Camera) -> Image.Image:
    """Draws the background of a camera: a wall with objects, and the ground. Every image shows a part of it."""
    scene = Image.new("RGB", _SCENE, camera.walls)
    draw = ImageDraw.Draw(scene)
    width, height = _SCENE
    for _ in range(26):
        x, y = rng.uniform(-0.1, 1.0) * width, rng.uniform(-0.1, 0.6) * height
        corner = (x + rng.uniform(8, 60), y + rng.uniform(12, 130))
        colour = _vary(rng, _pick(rng, CLOTH), 20) if rng.random() < 0.2 else _vary(rng, camera.walls, 24)
        (draw.ellipse if rng.random() < 0.25 else draw.rectangle)((x, y, *corner), fill=colour)
    horizon = int(0.68 * height)
    draw.rectangle((0, horizon, width, height), fill=camera.ground)
    for _ in range(14):
        x, y = rng.uniform(-0.1, 1.0) * width, rng.uniform(horizon, height)
        draw.rectangle((x, y, x + rng.uniform(20, 90), y + rng.uniform(3, 9)), fill=_vary(rng, camera.ground, 26))
    return scene.filter(ImageFilter.GaussianBlur(2.0))


def draw_image(
    rng: np.random.Generator, person: SimpleNamespace | None, camera: Camera, scene: Image.Image
) -> Image.Image:
    """A detection, RGB, 64 wide and 128 high: ``person`` (None for a false one) before a part of the ``scene``."""
    width, height = _CANVAS
    left, top = int(rng.integers(_SCENE[0] - width)), int(rng.integers(_SCENE[1] // 8, _SCENE[1] - height))
    canvas = scene.crop((left, top, left + width, top + height))
    if person is not None:
        facing = camera.facing if rng.random() < 0.7 else _pick(rng, ("front", "side", "back"))
        tall = height * camera.scale * person.height * rng.uniform(0.93, 1.07)
        centre = width * (0.5 + rng.uniform(-0.1, 0.1)) - camera.lean * tall / 2
        head = (height - tall) * rng.uniform(0.2, 0.9)
        mirror = camera.mirror != bool(rng.random() < 0.25)
        pen = _Pen(canvas, centre, head, tall, camera.lean, mirror)
        _draw_person(pen, person, facing, stride=float(rng.uniform(0.02, 0.12)))
        if rng.random() < 0.12:
            # A pole or a railing hides a part of the person.
            draw, at = ImageDraw.Draw(canvas), rng.uniform(0.1, 0.85)
            pole, railing = (at * width, 0, at * width + 12, height), (0, at * height, width, at * height + 16)
            draw.rectangle(pole if rng.random() < 0.5 else railing, fill=_vary(rng, camera.walls, 40))
    canvas = canvas.reduce(2).filter(ImageFilter.GaussianBlur(camera.blur))
    pixels = np.asarray(canvas, dtype=np.float32) / 255.0
    pixels = pixels ** (camera.gamma * rng.uniform(0.85, 1.18)) * np.asarray(camera.gain, dtype=np.float32)
    pixels = (pixels - 0.5) * camera.contrast + 0.5
    pixels = pixels * 255.0 + rng.normal(0.0, camera.noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
