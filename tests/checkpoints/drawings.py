"""Pictures with a question whose answer is only in the picture: a colour or a count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Box = tuple[float, float, float, float]  # left, top, right, bottom
Colour = tuple[int, int, int]

COLOURS = {
    "red": (215, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 70, 215),
    "yellow": (240, 215, 40),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
}
NUMBERS = ("one", "two", "three", "four")
_SMALLEST, _LARGEST = 64, 160  # pixels of a side


@dataclass(frozen=True)
class Drawing:
    """A picture, and what a model that sees it should say."""

    image: Image.Image
    question: str
    answer: str


def drawing(seed: int) -> Drawing:
    """The picture number `seed`: always the same one."""
    generator = np.random.default_rng(seed)
    return _KINDS[int(generator.integers(len(_KINDS)))](generator)


def _colour(generator: np.random.Generator) -> Drawing:
    background, name = generator.choice(list(COLOURS), 2, replace=False)
    image = _canvas(generator, background)
    box = _square_in(generator, image.size, float(generator.uniform(0.4, 0.8)))
    _SHAPES[generator.integers(len(_SHAPES))](ImageDraw.Draw(image), box, COLOURS[name])
    return Drawing(image, "What colour is the shape?", f"It is {name}.")


def _count(generator: np.random.Generator) -> Drawing:
    """Dots of one size, each in its own field of a grid, so that none hides another."""
    background, name = generator.choice(list(COLOURS), 2, replace=False)
    image = _canvas(generator, background)
    count = int(generator.integers(1, len(NUMBERS) + 1))
    columns, rows = (2, 3) if image.width < image.height else (3, 2)
    field = image.width / columns, image.height / rows
    for place in generator.choice(columns * rows, count, replace=False):
        left, top, right, bottom = _square_in(generator, field, 0.7)
        x, y = place % columns * field[0], place // columns * field[1]
        _circle(ImageDraw.Draw(image), (x + left, y + top, x + right, y + bottom), COLOURS[name])
    return Drawing(image, "How many dots are there?", f"There are {NUMBERS[count - 1]}.")


_KINDS: tuple[Callable[[np.random.Generator], Drawing], ...] = (_colour, _count)


def _canvas(generator: np.random.Generator, background: str) -> Image.Image:
    """Square, wide or tall, in a shade of `background`."""
    width, height = (int(side) for side in generator.integers(_SMALLEST, _LARGEST + 1, 2))
    shade = np.clip(np.array(COLOURS[background]) + generator.integers(-12, 13, 3), 0, 255)
    return Image.new("RGB", (width, height), tuple(int(value) for value in shade))


def _square_in(generator: np.random.Generator, sides: tuple[float, float], share: float) -> Box:
    """A square somewhere in a field of these sides, with this share of the smaller one."""
    size = share * min(sides)
    left, top = (generator.uniform(0, side - size) for side in sides)
    return left, top, left + size, top + size


def _circle(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.ellipse(box, fill=colour)


def _square(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    canvas.rectangle(box, fill=colour)


def _triangle(canvas: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
    left, top, right, bottom = box
    canvas.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)


_SHAPES = (_circle, _square, _triangle)
