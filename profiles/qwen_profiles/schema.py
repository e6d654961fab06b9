"""The one schema of a hardware profile, and how profiles are found by name."""

from __future__ import annotations

import difflib
import tomllib
from importlib.resources import files
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qwen_profiles.errors import UserError

Role = Literal[
    "mlp",
    "experts",
    "shared_expert",
    "attention",
    "linear_attention",
    "gate",
    "embedding",
    "lm_head",
    "vision",
]
ROLES: tuple[Role, ...] = get_args(Role)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightFormat(_Frozen):
    """How the projections of one role are stored.

    Attributes:
        precision: `int4` and `int8` are block-wise along the input features, `float` is the activations'
            dtype.
        block_size: input features that share one scale.
        symmetric: one fixed zero point in the middle of the codes, instead of one stored for each block.
    """

    precision: Literal["int4", "int8", "float"]
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = True


class Profile(_Frozen):
    """One hardware class: what runs there, in which precision, in which pieces.

    Attributes:
        name: as given to `--profile`; the TOML file's name.
        description: one line for lists.
        backend: which runtime family executes the artifact.
        provider: ONNX Runtime execution provider that the runtime tries first.
        lowering: `fused` uses the newest fused operators, `portable` only what DirectML has a kernel for.
        activation_dtype: dtype of activations, scales and KV cache.
        weights: format by role. A tied embedding follows `lm_head`; the router is always float.
            `vision` is the vision tower.
        accuracy_level: MatMulNBits' attribute; 4 lets the CPU quantise activations to int8.
        mtp: exports the checkpoint's MTP head, for speculative decoding: ONNX Runtime itself, without GenAI,
            must run the provider, and attention write into the cache that it is given (lowering `fused`).
        prefill_chunk: tokens of a prompt that are processed in one run, a power of two.
        context_length: tokens of prompt and answer together; at most the checkpoint's own limit.
    """

    name: str
    description: str
    backend: Literal["onnx"] = "onnx"
    provider: Literal["cpu", "cuda", "dml", "webgpu"]
    lowering: Literal["fused", "portable"]
    activation_dtype: Literal["float32", "float16"]
    weights: dict[Role, WeightFormat]
    accuracy_level: int = Field(default=0, ge=0, le=4)
    mtp: bool = False
    prefill_chunk: Literal[16, 32, 64, 128, 256, 512, 1024, 2048]
    context_length: int = Field(gt=0)


def profile_names() -> list[str]:
    """Names of the shipped profiles, sorted."""
    names = [entry.name for entry in files("qwen_profiles").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_profile(name: str) -> Profile:
    """The shipped profile called `name`.

    Raises:
        UserError: there is none; the message has the nearest name.
    """
    names = profile_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names)}"
        raise UserError(f"no profile '{name}': {hint}")
    text = (files("qwen_profiles") / f"{name}.toml").read_text(encoding="utf-8")
    return parse_profile(name, text)


def parse_profile(name: str, text: str) -> Profile:
    """A profile from TOML text.

    Raises:
        UserError: it is not TOML, or a field is missing, unknown or out of range; names the first one.
    """
    try:
        profile = Profile(name=name, **tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"profile '{name}' is not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"profile '{name}', field '{field}': {first['msg']}") from error
    missing = [role for role in ROLES if role not in profile.weights]
    if missing:
        raise UserError(f"profile '{name}' says no weight format for: {', '.join(missing)}")
    return profile
