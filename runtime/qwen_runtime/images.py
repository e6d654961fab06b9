"""Images on their way to the vision tower: read, resized, cut into patches.

ONNX Runtime GenAI's own processor does the same for programs in other languages, and agrees with this one
to 2e-7 on an opaque PNG. It is not used here because in 0.18 it minds neither transparency nor EXIF
orientation, decodes JPEG differently, ends the whole process at a GIF, and reads its limit of pixels from the
artifact, so that one photograph may fill the context.

Source: transformers' Qwen2VLImageProcessor; tests/runtime/test_images.py compares.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
from qwen_common.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

# Not every format that Pillow knows: some of them start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MOST_PIXELS = 100_000_000  # of a prompt's images: a small file can unpack to gigabytes
_STRIP = 256  # rows
_LONGEST_NAME = 120  # characters of a path in a message
# White space is left out, and the alphabet that is safe in URLs becomes the usual one.
_WRITTEN_OTHERWISE = str.maketrans({**dict.fromkeys(" \t\r\n\f"), "-": "+", "_": "/"})
_MOST_STRETCHED = 200  # longer to shorter side; transformers' limit


@dataclass(frozen=True)
class ImageSettings:
    """How the artifact wants its images, from its processor_config.json.

    Attributes:
        patch_size, merge_size: pixels of a patch's side, and patches of a feature's side.
        temporal_patch_size: frames in a patch; an image stands still in all of them.
        min_pixels, max_pixels: of a resized image.
        rescale_factor, mean, std: value = (byte * rescale_factor - mean) / std, by channel.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, config: Mapping[str, Any]) -> ImageSettings:
        """From the attributes of an ONNX Runtime Extensions image processor's steps."""
        steps = [transform["operation"] for transform in config["processor"]["transforms"]]
        values = {name: value for step in steps for name, value in step.get("attrs", {}).items()}
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    @property
    def factor(self) -> int:
        """Pixels of a feature's side: what width and height become multiples of."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class Patches:
    """One image as the vision tower takes it.

    Attributes:
        values: float32 [height * width, channels * frames * patch_size^2], in blocks of merge_size^2.
        height, width: in patches.
        tokens: features that they become, each in the place of one token.
        pixels: uint8 [rows, columns, 3], the resized image that was cut up.
    """

    values: np.ndarray
    height: int
    width: int
    tokens: int
    pixels: np.ndarray

    @property
    def key(self) -> int:
        """A negative number that tells this image from others."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).digest()
        return -1 - (int.from_bytes(digest[:8], "little") >> 1)


def take_images(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Any]]:
    """Separate the images from the text: messages for the chat template, and image sources in their order.

    Image parts are {"type": "image", "image": SOURCE}, with a SOURCE of `open_image`, and OpenAI's
    {"type": "image_url", "image_url": {"url": DATA_URL}}, which never opens a file.

    Raises:
        UserError: an image part without an image, a URL that is not a data URL, or a video.
    """
    sources: list[Any] = []

    def bare(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("video", "video_url"):
            raise UserError('a video is given as {"type": "video", "video": a path}, not as a URL')
        if kind not in ("image", "image_url"):
            return part
        source = part.get(kind)
        if kind == "image_url":
            source = source.get("url") if isinstance(source, Mapping) else source
            source = _from_data_url(source)
        if source is None:
            raise UserError('an image part has no image: give {"type": "image", "image": ...}')
        sources.append(source)
        return {"type": "image"}

    separated: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            message = {**message, "content": [bare(part) for part in content]}
        separated.append(message)
    return separated, sources


def _from_data_url(url: Any) -> bytes:
    """The bytes in a data URL, in base64 of either alphabet, in lines or not, with its `=` or without."""
    if not isinstance(url, str) or url[:5].lower() != "data:":
        raise UserError("an image's URL is not a data URL (data:image/png;base64,...): none is fetched")
    header, _, body = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise UserError("a data URL is not in base64: give data:image/png;base64,...")
    body = unquote(body).translate(_WRITTEN_OTHERWISE).rstrip("=")
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"a data URL is not valid base64 ({error}): encode the image again") from error


def open_images(sources: Sequence[Any], most_pixels: int = MOST_PIXELS) -> Iterator[Image]:
    """The image in each of `sources` - a path, a data URL, the bytes of a file, or a PIL image - as RGB,
    upright. One is unpacked at a time, and none before the sizes of all are known.

    Of an animation it is the first frame. What is transparent becomes white.

    Args:
        most_pixels: of all together.

    Raises:
        UserError: no such file, not an image or a broken one, or too large to unpack.
    """
    packed = [_read(source, _header, most_pixels) for source in sources]
    total = sum(image.width * image.height for image in packed)
    if total > most_pixels:
        raise UserError(
            f"the images have {total} pixels together, and the most is {most_pixels / 10**6:g} million: make "
            "them smaller"
        )
    del packed
    return (_read(source, _decoded, most_pixels) for source in sources)


def open_image(source: Any) -> Image:
    """One as `open_images` opens them."""
    return next(open_images([source]))


def _header(image: Image) -> Image:
    return image


def _decoded(image: Image) -> Image:
    from PIL import Image as images
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    # In strips: the whole would be there four times, with four bytes a pixel.
    found = images.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height))).convert("RGBA")
        white = images.new("RGBA", strip.size, "white")
        found.paste(images.alpha_composite(white, strip).convert("RGB"), (0, top))
    return found


def _read(source: Any, read: Callable[[Image], Image], most_pixels: int) -> Image:
    """What `read` makes of the image in `source`, of which only the header was read.

    Raises:
        UserError: as `open_images`.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("images need Pillow: pip install 'qwen-edge[vision]'") from error

    name = "the image"
    if isinstance(source, str) and source.lower().startswith(("data:", "http:", "https:")):
        source = _from_data_url(source)
    elif isinstance(source, str | Path):
        name = str(source)[:_LONGEST_NAME]
        if not os.path.isfile(source):  # False for a name that cannot be one, where Path raises
            raise UserError(f"no file {name}: give the path of an image")
    try:
        if isinstance(source, Image.Image):
            image = source
        else:
            file = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
            with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
                image = Image.open(file, formats=_FORMATS)
        _check_size(name, *image.size, most_pixels)
        return read(image)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large ({error}): make it smaller") from error
    except PermissionError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    except Exception as error:  # a broken file can raise nearly anything in Pillow's decoders
        kinds = ", ".join(_FORMATS)
        raise UserError(
            f"{name} is not a whole image of a known kind ({kinds}): convert it to PNG"
        ) from error


def _check_size(name: str, width: int, height: int, most_pixels: int) -> None:
    if width * height > most_pixels:
        raise UserError(
            f"{name} has {width} x {height} pixels, and the most is {most_pixels / 10**6:g} million: make it "
            "smaller"
        )
    if max(width, height) > _MOST_STRETCHED * min(width, height):
        raise UserError(
            f"{name} has {width} x {height} pixels: one side may be {_MOST_STRETCHED} times the other, cut it"
        )


def cut_patches(image: Image, settings: ImageSettings, most_tokens: int) -> Patches:
    """Resize `image` to at most `most_tokens` features, where its shape allows that, and cut it up."""
    from PIL.Image import Resampling

    most_pixels = min(settings.max_pixels, most_tokens * settings.factor**2)
    least_pixels = min(settings.min_pixels, most_pixels)
    width, height = _fitting_size(image.width, image.height, settings.factor, least_pixels, most_pixels)
    resized = np.asarray(image.resize((width, height), Resampling.BICUBIC))
    scaled = (resized.astype(np.float64) * settings.rescale_factor).astype(np.float32)
    values = (scaled - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)

    merge, patch = settings.merge_size, settings.patch_size
    rows, columns, channels = height // patch, width // patch, values.shape[2]
    blocks = values.reshape(rows // merge, merge, patch, columns // merge, merge, patch, channels)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, channels, 1, patch, patch)
    frames = np.repeat(blocks, settings.temporal_patch_size, axis=2)
    return Patches(frames.reshape(rows * columns, -1), rows, columns, rows * columns // merge**2, resized)


def _fitting_size(width: int, height: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Multiples of `factor` near `width` and `height` with `least` to `most` pixels (smart_resize)."""

    across, down = round(width / factor) * factor, round(height / factor) * factor
    if across * down > most:
        shrink = math.sqrt(width * height / most)
        across, down = (max(factor, int(side / shrink / factor) * factor) for side in (width, height))
    elif across * down < least:
        grow = math.sqrt(least / (width * height))
        across, down = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return across, down


def expand(tokens: Sequence[int], image_token: int, video_token: int, images: Sequence[Patches]) -> list[int]:
    """`tokens` with each image token repeated once for every feature of its image.

    Raises:
        UserError: there are not as many image tokens as images, or a video token, because a text has one
            written in it.
    """
    if tokens.count(image_token) != len(images) or video_token in tokens:
        raise UserError("a text has an image or video token written in it: remove it")
    counts = iter(images)
    expanded: list[int] = []
    for token in tokens:
        expanded += [token] * next(counts).tokens if token == image_token else [token]
    return expanded


def vision_inputs(tokens: Sequence[int], images: Sequence[Patches]) -> dict[str, np.ndarray]:
    """A prompt with images as ONNX Runtime GenAI's Qwen pipeline wants it in `Generator.set_inputs`."""
    return {
        "input_ids": np.asarray([tokens], np.int32),
        "pixel_values": np.concatenate([image.values for image in images]),
        "image_grid_thw": np.asarray([[1, image.height, image.width] for image in images], np.int64),
        "num_image_tokens": np.asarray([sum(image.tokens for image in images)], np.int64),
    }
