"""Pictures with a question whose answer is only in the picture: a colour, a count or a digit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
    size = generator.uniform(0.4, 0.8) * min(image.size)
    left, top = (generator.uniform(0, side - size) for side in image.size)
    _shape(generator, image, (left, top, left + size, top + size), COLOURS[name])
    return Drawing(image, "What colour is the shape?", f"It is {name}.")


def _count(generator: np.random.Generator) -> Drawing:
    """Shapes of one colour, each in its own field of a grid, so that none hides another."""
    background, name = generator.choice(list(COLOURS), 2, replace=False)
    image = _canvas(generator, background)
    count = int(generator.integers(1, len(NUMBERS) + 1))
    columns, rows = (2, 3) if image.width < image.height else (3, 2)
    width, height = image.width / columns, image.height / rows
    for field in generator.choice(columns * rows, count, replace=False):
        size = generator.uniform(0.6, 0.85) * min(width, height)
        left = field % columns * width + generator.uniform(0, width - size)
        top = field // columns * height + generator.uniform(0, height - size)
        _shape(generator, image, (left, top, left + size, top + size), COLOURS[name])
    return Drawing(image, "How many shapes are there?", f"There are {NUMBERS[count - 1]}.")


def _digit(generator: np.random.Generator) -> Drawing:
    dark, light = generator.choice(["black", "blue", "purple"]), generator.choice(["white", "yellow"])
    ink, background = generator.permutation([dark, light])
    image = _canvas(generator, background)
    digit = str(generator.integers(10))
    font = ImageFont.load_default(size=float(generator.uniform(0.65, 0.95) * min(image.size)))
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = canvas.textbbox((0, 0), digit, font=font)
    x = generator.uniform(0, image.width - (right - left)) - left
    y = generator.uniform(0, image.height - (bottom - top)) - top
    canvas.text((x, y), digit, fill=COLOURS[ink], font=font)
    return Drawing(image, "Which digit is it?", f"It is {digit}.")


_KINDS: tuple[Callable[[np.random.Generator], Drawing], ...] = (_colour, _count, _digit)


def _canvas(generator: np.random.Generator, background: str) -> Image.Image:
    """Square, wide or tall, in a shade of `background`."""
    width, height = (int(side) for side in generator.integers(_SMALLEST, _LARGEST + 1, 2))
    shade = np.clip(np.array(COLOURS[background]) + generator.integers(-12, 13, 3), 0, 255)
    return Image.new("RGB", (width, height), tuple(int(value) for value in shade))


def _shape(
    generator: np.random.Generator,
    image: Image.Image,
    box: tuple[float, float, float, float],
    colour: tuple[int, int, int],
) -> None:
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = box
    kind = generator.integers(3)
    if kind == 0:
        canvas.ellipse(box, fill=colour)
    elif kind == 1:
        canvas.rectangle(box, fill=colour)
    else:
        canvas.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)
