"""Videos as sampled frames: ONNX Runtime GenAI's Qwen pipeline has an input for images only."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qwen_common.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_FRAMES = 8
# Not every format that FFmpeg knows: some are lists of other files or addresses, some cannot find a time.
_FORMATS = "avi,gif,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2"
_LONGEST_NAME = 120  # characters of a path in a message


def with_frames(messages: Sequence[Mapping[str, Any]], count: int | None) -> list[Mapping[str, Any]]:
    """`messages` with each part {"type": "video", "video": SOURCE} replaced by at most `count` frames (None:
    8), and the time of each in the text before it, written as Qwen3-VL's processor in transformers writes it.

    Raises:
        UserError: as in `sample_frames`, or a video part without a video.
    """

    def parts(part: Any) -> list[Any]:
        if not isinstance(part, Mapping) or part.get("type") != "video":
            return [part]
        if part.get("video") is None:
            raise UserError('a video part has no video: give {"type": "video", "video": ...}')
        return [
            shown
            for seconds, image in sample_frames(part["video"], DEFAULT_FRAMES if count is None else count)
            for shown in (
                {"type": "text", "text": f"<{seconds:.1f} seconds>"},
                {"type": "image", "image": image},
            )
        ]

    replaced: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            message = {**message, "content": [shown for part in content for shown in parts(part)]}
        replaced.append(message)
    return replaced


def sample_frames(source: Any, count: int) -> list[tuple[float, Image]]:
    """`count` frames of `source` - a path, or the bytes of a file - from the first to the last, with as many
    frames between each two, or all where there are fewer; each with its time in seconds.

    Raises:
        UserError: PyAV is not installed, no such file, not a video or a broken one, or a count below 1.
    """
    if count < 1:
        raise UserError(f"{count} frames of a video are asked for, but there must be at least 1")
    try:
        import av
    except ImportError as error:
        raise UserError("videos need PyAV: pip install 'qwen-edge[video]'") from error

    name = "the video"
    if isinstance(source, str | Path):
        name = str(source)[:_LONGEST_NAME]
        if not os.path.isfile(source):
            raise UserError(f"no file {name}: give the path of a video")
    elif not isinstance(source, bytes | bytearray | memoryview):
        raise UserError("a video is neither a path nor the bytes of a file")
    try:
        # An open file and no protocols, so that nothing in the video opens another file.
        with (
            open(source, "rb") if isinstance(source, str | Path) else io.BytesIO(source) as file,
            av.open(file, options={"format_whitelist": _FORMATS, "protocol_whitelist": ""}) as container,
        ):
            return _frames(container, count)
    except PermissionError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    except (av.FFmpegError, ValueError) as error:
        kinds = "MP4, MOV, WebM, MKV, AVI, GIF"
        raise UserError(
            f"{name} is not a whole video of a known kind ({kinds}): convert it to MP4"
        ) from error


def _frames(container: Any, count: int) -> list[tuple[float, Image]]:
    """Two passes: the packets' times are quickly read and never wrong, as a duration or a rate may be."""
    stream = next(iter(container.streams.video), None)
    times = (
        sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None) if stream else []
    )
    if stream is None or not times:
        raise ValueError("it has no pictures")
    frames = []
    for place in sorted({round(at) for at in np.linspace(0, len(times) - 1, count)}):
        container.seek(times[place], stream=stream)  # to a picture before it that needs no other
        frame = next((frame for frame in container.decode(stream) if frame.pts == times[place]), None)
        if frame is None:
            raise ValueError("a picture cannot be decoded")
        seconds = float((times[place] - times[0]) * stream.time_base)
        frames.append((seconds, frame.to_image().rotate(frame.rotation, expand=True)))
    return frames
