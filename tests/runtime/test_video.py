"""Videos as sampled frames, from files that the tests draw themselves."""

from __future__ import annotations

import builtins
import io
import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import pytest
from PIL import Image, ImageDraw
from qwen_common.errors import UserError
from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling
from qwen_runtime.video import sample_frames, with_frames

from benchmarks.support.checkpoints import TINY_VL
from tests.checkpoints.drawings import COLOURS
from tests.support.exported import Exported

FRAMES_A_SECOND = 10
FORMATS = {"mp4": "libx264", "mov": "mpeg4", "webm": "libvpx-vp9", "mkv": "libx264", "avi": "mpeg4"}


def video(images: Sequence[Image.Image], form: str = "mp4", codec: str = "mpeg4") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska"}.get(form, form)) as container:
        stream = container.add_stream(codec, rate=FRAMES_A_SECOND)
        stream.width, stream.height = images[0].size
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file.getvalue()


def plain(name: str) -> Image.Image:
    return Image.new("RGB", (96, 64), COLOURS[name])


def nearest(image: Image.Image, x: int = 48, y: int = 32) -> str:
    """The name of the colour there; encoding changes it a little."""
    seen = image.getpixel((x, y))
    assert isinstance(seen, tuple)
    return min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(seen, COLOURS[name], strict=True)))


FOUR = [plain(name) for name in ("red", "green", "blue", "yellow") for _ in range(10)]


@pytest.mark.parametrize("form", FORMATS)
def test_frames_are_sampled_evenly_from_first_to_last(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip.{form}"
    path.write_bytes(video(FOUR, form, FORMATS[form]))
    frames = sample_frames(path, 4)
    assert [nearest(image) for _, image in frames] == ["red", "green", "blue", "yellow"]
    assert [seconds for seconds, _ in frames] == pytest.approx([0, 1.3, 2.6, 3.9], abs=0.01)
    assert [nearest(image) for _, image in sample_frames(str(path), 1)] == ["red"]
    assert len(sample_frames(path.read_bytes(), 100)) == 40  # all that there are


def test_a_video_that_was_filmed_upright_is_shown_upright() -> None:
    """Phones film lying down and write into the file how to turn it."""
    image = plain("red")
    image.paste(COLOURS["blue"], (48, 0, 96, 64))
    data = video([image] * 5)
    matrix = data.index(b"tkhd") + 44
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    ((_, shown),) = sample_frames(data[:matrix] + turned + data[matrix + len(turned) :], 1)
    assert shown.size == (64, 96)
    assert (nearest(shown, 32, 10), nearest(shown, 32, 86)) == ("red", "blue")


def test_each_frame_comes_after_its_time() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "video", "video": video(FOUR)}, {"type": "text", "text": "What happens?"}],
        },
    ]
    system, user = with_frames(messages, 2)
    assert system == messages[0]
    assert [part.get("text", part["type"]) for part in user["content"]] == [
        "<0.0 seconds>",
        "image",
        "<3.9 seconds>",
        "image",
        "What happens?",
    ]
    assert len(with_frames(messages, None)[1]["content"]) == 2 * 8 + 1


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n/etc/hostname\n#EXT-X-ENDLIST\n"
BAD = {
    "no such file": ("gone.mp4", "no file gone.mp4"),
    "a URL": ("https://example.com/a.mp4", "no file https"),
    "a folder": (Path(__file__).parent, "no file"),
    "a number": (5, "neither a path nor the bytes"),
    "nothing": (b"", "not a whole video"),
    "text": (b"not a video" * 100, "not a whole video"),
    "cut off": (video(FOUR)[:-200], "not a whole video"),
    "a list of files": (PLAYLIST, "not a whole video"),
}


@pytest.mark.parametrize("kind", BAD)
def test_videos_that_are_none(kind: str) -> None:
    source, message = BAD[kind]
    with pytest.raises(UserError, match=message) as caught:
        sample_frames(source, 2)
    assert "\n" not in str(caught.value)


def test_sound_alone_is_no_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("pcm_s16le", rate=44100)
        frame = av.AudioFrame(format="s16", layout="mono", samples=1024)
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
    with pytest.raises(UserError, match="not a whole video"):
        sample_frames(file.getvalue(), 2)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="0 frames"):
        sample_frames(video(FOUR), 0)
    with pytest.raises(UserError, match="a video part has no video"):
        with_frames([{"role": "user", "content": [{"type": "video"}]}], 2)
    real = builtins.__import__

    def without(name: str, *rest: object, **options: object) -> object:
        if name == "av":
            raise ImportError(name)
        return real(name, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'qwen-edge\[video\]'"):
        sample_frames("clip.mp4", 2)


@pytest.fixture(scope="module")
def artifact(exported: Exported) -> Path:
    return exported(TINY_VL, load_profile("cpu"))


def shape(name: str) -> Image.Image:
    """As the trained checkpoint knows them."""
    image = Image.new("RGB", (128, 96), COLOURS["black" if name == "white" else "white"])
    ImageDraw.Draw(image).rectangle((32, 16, 96, 80), fill=COLOURS[name])
    return image


def test_it_tells_what_a_frame_shows(artifact: Path) -> None:
    """The checkpoint saw one picture at a time in its training, so it is shown one frame."""
    with Model.load(artifact) as model:
        for name in ("red", "green", "blue", "yellow"):
            question = [
                {"type": "video", "video": video([shape(name)] * 5)},
                {"type": "text", "text": "What colour is the shape?"},
            ]
            answer = model.generate(
                [{"role": "user", "content": question}],
                video_frames=1,
                max_tokens=12,
                sampling=Sampling(temperature=0),
            )
            assert "".join(answer) == f"It is {name}."
        more = model.generate([{"role": "user", "content": question}], max_tokens=1)
        assert more.prompt_tokens > 3 * answer.prompt_tokens / 2  # five frames


def test_the_command_says_that_it_is_sampled_frames(artifact: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(video([shape("green")] * 5))
    command = [sys.executable, "-c", "from qwen_runtime.cli import main; main()", str(artifact)]
    command += ["--video", str(clip), "--video-frames", "1", "--temperature", "0", "--json"]
    done = subprocess.run([*command, "What colour is the shape?"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["text"] == "It is green."
    assert "clip.mp4 is shown as images: frames sampled evenly" in done.stderr
    gone = subprocess.run([*command, "What?", "--video", "gone.mp4"], capture_output=True, text=True)
    assert gone.returncode == 2 and "'gone.mp4' does not exist" in gone.stderr
