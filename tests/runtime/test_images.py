"""Images through the runtime: prepared as transformers prepares them, answered alike, refused clearly."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from PIL import Image
from qwen_common.errors import UserError
from qwen_export.adapters.switched import with_switched_adapters
from qwen_export.backends.onnx.processor_config import processor_config
from qwen_export.checkpoint import Checkpoint
from qwen_export.checkpoint.config import load_vision_config
from qwen_export.export import export
from qwen_runtime import Model, Sampling
from qwen_runtime.cli import main
from qwen_runtime.images import ImageSettings, cut_patches, expand, open_image, take_images, vision_inputs
from transformers import AutoTokenizer
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.support.artifacts import Quiet, float_profile, make_artifact
from tests.support.adapters import train
from tests.support.random_checkpoints import VISION_TOKENS, random_vision_model, write_vision_checkpoint

GREEDY = Sampling(temperature=0)
ALL = 10**6  # tokens: no limit
IMAGE_AND_VIDEO = (VISION_TOKENS["image_token_id"], VISION_TOKENS["video_token_id"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module", params=["fused", "portable"])
def artifact(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: Any) -> Path:
    output = tmp_path_factory.mktemp("artifact") / "float"
    return make_artifact(checkpoint, float_profile(request.param), output, all_logits=False)


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[Model]:
    with Model.load(artifact, provider="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def settings(checkpoint: Path) -> ImageSettings:
    config = load_vision_config(checkpoint)
    assert config is not None
    return ImageSettings.from_processor(processor_config(config))


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise with soft edges."""
    shape = (height // 4 + 1, width // 4 + 1, len(mode))
    noise = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Image.fromarray(noise if len(mode) > 1 else noise[..., 0]).resize(
        (width, height), Image.Resampling.BILINEAR
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def asking(*images: Any, text: str = "What is this?") -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


SIZES = [(64, 64), (200, 50), (31, 77), (333, 257), (1, 1), (8, 900), (1000, 700)]


@pytest.mark.parametrize("width, height", SIZES)
def test_patches_are_those_of_transformers(
    checkpoint: Path, settings: ImageSettings, width: int, height: int
) -> None:
    expected = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)(picture(width, height))
    found = cut_patches(picture(width, height), settings, ALL)
    assert expected["image_grid_thw"].tolist() == [[1, found.height, found.width]]
    np.testing.assert_allclose(found.values, expected["pixel_values"], atol=1e-6)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


FILES = {
    "png": encoded(picture(90, 60)),
    "grey png": encoded(picture(90, 60, "L")),
    "palette with transparency": encoded(picture(90, 60).quantize(16), transparency=3),
    "transparent png": encoded(picture(90, 60, "RGBA")),
    "jpeg": encoded(picture(90, 60), "JPEG"),
    "jpeg, rotated by EXIF": encoded(picture(90, 60), "JPEG", exif=exif(6)),
    "gif": encoded(picture(90, 60), "GIF"),
    "webp": encoded(picture(90, 60), "WEBP"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_are_read_as_transformers_reads_them(checkpoint: Path, settings: Any, kind: str) -> None:
    as_url = "data:image/png;base64," + base64.b64encode(FILES[kind]).decode()
    # Its loader drops transparency before its processor can lay it on white, as it does with an image.
    image = Image.open(io.BytesIO(FILES[kind])) if "transparen" in kind else load_image(as_url)
    expected = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)(image)
    found = cut_patches(open_image(FILES[kind]), settings, ALL)
    assert expected["image_grid_thw"].tolist() == [[1, found.height, found.width]]
    np.testing.assert_allclose(found.values, expected["pixel_values"], atol=1e-6)


def test_data_urls_as_clients_write_them() -> None:
    file = FILES["png"]
    usual = base64.b64encode(file).decode()
    safe = base64.urlsafe_b64encode(file).decode()
    lines = base64.encodebytes(file).decode()
    expected = open_image(file).tobytes()
    for url in [
        f"data:image/png;base64,{usual}",
        f"DATA:image/PNG;BASE64,{usual}",
        f"data:image/png;base64,{lines}",
        f"data:image/png;base64, {usual.rstrip('=')}",
        f"data:image/png;base64,{safe}",
        f"data:;base64,{usual.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
    ]:
        assert open_image(url).tobytes() == expected
        _, [source] = take_images([{"content": [{"type": "image_url", "image_url": {"url": url}}]}])
        assert source == file


def test_genais_own_processor_agrees(artifact: Path, settings: ImageSettings, tmp_path: Path) -> None:
    """The file that programs in other languages rely on: one image, and two of different sizes."""
    config = og.Config(str(artifact))
    config.clear_providers()
    genai = og.Model(config)
    processor = genai.create_multimodal_processor()
    paths = [tmp_path / "wide.png", tmp_path / "tall.png"]
    for path, size in zip(paths, [(90, 60), (40, 120)], strict=True):
        path.write_bytes(encoded(picture(*size)))
    text = "<|vision_start|><|image_pad|><|vision_end|>What?"

    theirs = processor(text, images=og.Images.open(str(paths[0])))
    found = cut_patches(open_image(paths[0]), settings, ALL)
    assert theirs["image_grid_thw"].as_numpy().tolist() == [[1, found.height, found.width]]
    np.testing.assert_allclose(theirs["pixel_values"].as_numpy(), found.values, atol=1e-5)

    def logits(inputs: og.NamedTensors) -> np.ndarray:
        parameters = og.GeneratorParams(genai)
        parameters.set_search_options(max_length=600)
        generator = og.Generator(genai, parameters)
        generator.set_inputs(inputs)
        return generator.get_logits()[0, -1]

    images = [cut_patches(open_image(path), settings, ALL) for path in paths]
    tokens = [int(token) for token in og.Tokenizer(genai).encode(text * 2)]
    ours = og.NamedTensors()
    for name, value in vision_inputs(expand(tokens, *IMAGE_AND_VIDEO, images), images).items():
        ours[name] = value
    theirs = processor(text * 2, images=og.Images.open(*map(str, paths)))
    np.testing.assert_allclose(logits(theirs), logits(ours), atol=1e-3)


def test_limit_of_tokens(settings: ImageSettings) -> None:
    """Shape kept as far as multiples of a feature's side allow; never more than the limit."""
    for most in (1, 2, 5, 16, 100, 1000):
        found = cut_patches(picture(640, 480), settings, most)
        assert found.tokens <= most
        assert found.values.shape == (found.height * found.width, 96)
    assert (found.height, found.width) == (54, 72)


def transformers_answer(
    checkpoint: Path, messages: list[dict[str, Any]], count: int, model: Any = None
) -> tuple[int, list]:
    """Prompt length and greedy tokens, by transformers' own processor, template and model."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    content = messages[0]["content"]
    images = [part["image"] for part in content if part["type"] == "image"]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs: dict[str, torch.Tensor] = {}
    if images:
        inputs = dict(processor(images, return_tensors="pt"))
    ids: list[int] = []
    grids = iter(inputs["image_grid_thw"].tolist()) if images else iter([])
    for token in tokenizer(prompt)["input_ids"]:
        repeats = np.prod(next(grids)) // 4 if token == VISION_TOKENS["image_token_id"] else 1
        ids += [token] * int(repeats)
    if images:
        is_image = np.array([ids]) == VISION_TOKENS["image_token_id"]
        inputs["mm_token_type_ids"] = torch.tensor(is_image.astype(np.int64))
    with torch.no_grad():
        found = (model or random_vision_model()).generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0, **inputs
        )
    return len(ids), found[0, len(ids) :].tolist()


@pytest.mark.parametrize("sizes", [[(64, 64)], [(120, 40), (40, 120)], [(60, 60)] * 2, []])
def test_same_answers_as_transformers(model: Model, checkpoint: Path, sizes: list[tuple[int, int]]) -> None:
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    messages = asking(*images)
    length, expected = transformers_answer(checkpoint, messages, 24)
    generation = model.generate(messages, max_tokens=24, sampling=GREEDY)
    for _ in generation:
        pass
    assert generation.prompt_tokens == length
    assert generation.tokens == [token for token in expected if token != 2037]


def test_adapters_are_pefts(checkpoint: Path, tmp_path: Path) -> None:
    """Of a model that sees, with images and without: ONNX Runtime GenAI would pass over them."""
    adapter, profile = tmp_path / "style", float_profile("fused")
    train(random_vision_model(), adapter, target_modules=r".*language_model.*\.(q_proj|up_proj|out_proj)")
    merged = PeftModel.from_pretrained(random_vision_model(), adapter).merge_and_unload()
    export(
        with_switched_adapters(Checkpoint.open(str(checkpoint)), [str(adapter)], profile),
        profile,
        tmp_path / "out",
        Quiet(),
    )
    with Model.load(tmp_path / "out") as model:
        assert model.info.reason.endswith("for the adapters of a model that sees")
        for messages in (asking(picture(64, 64)), asking()):
            for name, reference in ((None, None), ("style", merged), (None, None)):
                expected = transformers_answer(checkpoint, messages, 8, reference)[1]
                generation = model.generate(messages, max_tokens=8, sampling=GREEDY, adapter=name)
                generation.run()
                assert generation.tokens == [token for token in expected if token != 2037]


def answer(model: Model, messages: list[dict[str, Any]], **options: Any) -> str:
    return "".join(model.generate(messages, max_tokens=8, sampling=GREEDY, **options))


def test_every_way_to_give_an_image(model: Model, tmp_path: Path) -> None:
    image = picture(90, 60)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image))
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    openai = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    answers = {
        answer(model, asking(image)),
        answer(model, asking(path)),
        answer(model, asking(str(path))),
        answer(model, asking(path.read_bytes())),
        answer(model, asking(url)),
        answer(model, [{"role": "user", "content": openai}]),
    }
    assert len(answers) == 1
    assert answers != {answer(model, asking(picture(90, 60, seed=1)))}


def test_images_of_earlier_turns_stay_in_the_conversation(model: Model) -> None:
    rest = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    one, other = ([*asking(picture(64, 64, seed=seed)), *rest] for seed in (0, 1))
    assert answer(model, one) != answer(model, other)


def test_images_shrink_to_what_the_prompt_holds(model: Model) -> None:
    """A portable artifact takes a prompt with images in one run, and that has a limit."""
    small = model.generate(asking(picture(640, 480)), max_tokens=1, max_image_tokens=20)
    large = model.generate(asking(picture(640, 480)), max_tokens=1)
    assert small.prompt_tokens < 60
    assert large.prompt_tokens > {"cpu": 900, "strix-halo": 450}[model.info.profile]
    if model.info.profile == "strix-halo":
        assert large.prompt_tokens <= 512
    assert len(list(large)) <= 1


HUGE = encoded(Image.new("1", (12_000, 12_000)))
BAD = {
    "no such file": ("gone.jpg", "no file gone.jpg"),
    "no possible file": ("a" * 10_000, "no file a+: give the path"),
    "no possible name": ("a\0b", "no file"),
    "a URL": ("https://example.com/a.png", "none is fetched"),
    "a folder": (Path(__file__).parent, "no file"),
    "text": (b"not an image", "not a whole image"),
    "nothing": (b"", "not a whole image"),
    "cut off": (FILES["png"][:200], "not a whole image"),
    "cut off jpeg": (FILES["jpeg"][: len(FILES["jpeg"]) // 2], "not a whole image"),
    "wrong checksum": (FILES["png"][:60] + b"\0\0\0" + FILES["png"][63:], "not a whole image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a whole image"),
    "huge": (HUGE, "12000 x 12000 pixels, and the most is 100 million"),
    "a strip": (encoded(Image.new("RGB", (1000, 4))), "one side may be 200 times the other"),
    "a number": (5, "not a whole image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_images_that_are_none(model: Model, kind: str) -> None:
    source, message = BAD[kind]
    with pytest.raises(UserError, match=message) as caught:
        model.generate(asking(source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "not a data URL"),
        ({"type": "image_url", "image_url": {"url": "/etc/hostname"}}, "not a data URL"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}, "not in base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}, "not valid base64"),
        ({"type": "image_url"}, "not a data URL"),
        ({"type": "image"}, "no image"),
        ({"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}, "not as a URL"),
    ],
)
def test_parts_that_are_not_right(model: Model, part: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.generate([{"role": "user", "content": [part]}])


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|><|video_pad|>"])
def test_image_or_video_token_in_a_text(model: Model, token: str) -> None:
    for prompt in (asking(text=token), asking(picture(64, 64), text=token), token):
        with pytest.raises(UserError, match="image or video token written in it"):
            model.generate(prompt)


def test_text_that_leaves_no_room(model: Model) -> None:
    with pytest.raises(UserError, match="shorten it, or give fewer images"):
        model.generate(asking(picture(64, 64), text="why " * 5000))
    with pytest.raises(UserError, match="max_image_tokens is 0"):
        model.generate(asking(picture(64, 64)), max_image_tokens=0)


def test_text_artifact_says_that_it_takes_no_images(cpu_artifact: Path) -> None:
    with Model.load(cpu_artifact) as model, pytest.raises(UserError, match="takes no images"):
        model.generate(asking(picture(64, 64)))


def test_command(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(90, 60)))
    (tmp_path / "b.jpg").write_bytes(encoded(picture(60, 90), "JPEG"))
    (tmp_path / "c.png").write_text("no image")
    run = CliRunner().invoke
    begin = [str(artifact), "--provider", "cpu", "--max-tokens", "4", "--temperature", "0", "--json"]
    images = ["--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.jpg")]
    both, one = run(main, [*begin, *images, "Q"]), run(main, [*begin, *images[:2], "Q"])
    assert both.exit_code == one.exit_code == 0
    tokens = [json.loads(result.stdout)["usage"]["prompt_tokens"] for result in (both, one)]
    assert tokens[0] > tokens[1] + 20
    broken = run(main, [*begin, "--image", str(tmp_path / "c.png"), "Q"])
    assert broken.exit_code == 2
    assert broken.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'c.png'} is not a whole image")
    for arguments in (["--image", str(tmp_path / "a.png")], ["--raw", *images, "Q"]):
        assert run(main, [str(artifact), *arguments]).exit_code == 2


def test_text_needs_no_pillow(artifact: Path) -> None:
    """Pillow is an extra: only an image loads it, and its absence is said."""
    script = (
        "import sys; sys.modules['PIL'] = None\n"
        "from qwen_runtime import Model\n"
        "from qwen_common.errors import UserError\n"
        f"model = Model.load({str(artifact)!r}, provider='cpu')\n"
        "print(len(list(model.generate([{'role': 'user', 'content': 'hi'}], max_tokens=2))))\n"
        "try: model.generate([{'role': 'user', 'content': [{'type': 'image', 'image': b''}]}])\n"
        "except UserError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'qwen-edge[vision]'" in result.stdout
