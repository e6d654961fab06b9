"""The one schema of a hardware profile, and how one is loaded and overridden."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from qwen_common.errors import UserError
from qwen_common.files import parse_toml, read_text
from qwen_common.genai_config import option_fault
from qwen_common.manifest import BackendName
from qwen_common.providers import CPU, PROVIDERS

from qwen_profiles.faults import first_fault
from qwen_profiles.reading import merged, read_fields, shipped_text
from qwen_profiles.values import Amount, Expression, Integer, Number, PciId, ProviderKey, ThreadCount

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
_COMPRESSIONS = {
    BackendName.ONNX: ("data-free", "gptq", "gptaq"),
    BackendName.OPENVINO: ("data-free", "scale-estimation", "awq", "gptq"),
}
OUTSIDE_LAYERS: frozenset[Role] = frozenset({"embedding", "lm_head", "vision"})


class _Frozen(BaseModel):
    # The strings below the fields are their descriptions, which docs/profiles.md is made from.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class WeightFormat(_Frozen):
    """How the projections of one role are stored. In place of a table, `"int4"` names the precision alone."""

    precision: Literal["int2", "int4", "int8", "float"]
    """`int2`, `int4`, `int8` are block-wise along the input features, `float` is the activations' dtype."""

    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Input features that share one scale."""

    symmetric: bool = True
    """One fixed zero point in the middle of the codes, instead of one stored for each block."""

    @property
    def bits(self) -> int | None:
        """Of a code; None: it is no code."""
        return None if self.precision == "float" else int(self.precision.removeprefix("int"))

    @model_validator(mode="after")
    def _blocks_with_kernels(self) -> WeightFormat:
        # Kernels of 2 bits take blocks of 16, and are 200 times slower (onnxruntime 1.32's CPU, measured).
        if self.precision == "int2" and self.block_size < 32:
            raise ValueError("int2 has no quick kernel for blocks of 16: set block_size to 32 or more")
        return self


class FrequentTokens(WeightFormat):
    """How the rows of frequent tokens are stored."""

    share: Number = Field(ge=0, lt=1)
    """Of all tokens, those with the lowest ids, which byte-pair encoding gave to the most frequent ones, in
    whole groups of 64 rows; 0, or less than a group: none."""


class Recognise(_Frozen):
    """How a machine of this class is told from others: any one pattern or id that is given must fit, and
    all of the CPU flags."""

    cpu: tuple[Expression, ...] = ()
    """Regular expressions, searched for in the CPU's name, case ignored."""

    gpu: tuple[Expression, ...] = ()
    """Regular expressions, searched for in the names of the graphics devices, case ignored."""

    pci: tuple[PciId, ...] = ()
    """Graphics devices as `vendor:device`, four lower-case hexadecimal digits each; `*` for any device."""

    cpu_flags: tuple[str, ...] = ()
    """Instruction sets that the CPU must have, as Linux's /proc/cpuinfo calls them."""


class Hardware(_Frozen):
    """What the machine has for the model."""

    memory_budget_gb: Amount
    """Memory, in 10^9 bytes, that the model, its cache and its working memory may take together."""

    bandwidth_gb_s: Amount
    """Peak bandwidth of that memory, in 10^9 bytes per second."""

    recognise: Recognise = Recognise()
    """How to recognise it."""


class Quality(_Frozen):
    """What an artifact must reach when it is verified against its checkpoint."""

    max_kl_divergence: Number = Field(gt=0)
    """Most KL divergence of the next-token distributions, in nats, mean over positions."""

    min_top1_agreement: Number = Field(ge=0, le=1)
    """Least share of positions at which both find the same token the most likely."""


class Profile(_Frozen):
    """One hardware class: what runs there, in which precision, in which pieces."""

    name: str
    """As given to `--profile`: the TOML file's name, not a field in it."""

    description: str
    """One line for lists."""

    backend: BackendName = BackendName.ONNX
    """Which runtime family executes the artifact: ONNX Runtime or OpenVINO GenAI."""

    provider: ProviderKey
    """ONNX Runtime execution provider that the runtime tries first."""

    fallbacks: tuple[ProviderKey, ...] = ()
    """Providers that the runtime tries after it, in this order; for ONNX Runtime. Each whose kernels need
    another graph gets its own in the artifact, over the same weights."""

    device: Literal["cpu", "gpu", "npu"]
    """What kind of device the provider runs on."""

    provider_options: dict[str, str] = {}
    """The provider's own options, added to those that every artifact needs on it. None that names a file."""

    lowering: Literal["fused", "portable"]
    """`fused` uses the newest fused operators, `portable` only what DirectML has a kernel for. A fallback
    without kernels for it gets the other one."""

    activation_dtype: Literal["float32", "float16"]
    """Dtype of activations."""

    scale_dtype: Literal["float32", "float16"] | None = None
    """Dtype in which the scales of quantised weights are stored; not set: the activations'. With float32
    activations, float16 scales are widened when the artifact is loaded."""

    cache_dtype: Literal["float32", "float16", "int8"] | None = None
    """Dtype of the KV cache; not set: the activations', which every provider takes. `int8`, on the CPU: a
    quarter of float32's memory, its scales found on a calibration text. A token after a long prompt comes
    sooner, and reading the prompt takes longer."""

    weights: dict[Role, WeightFormat]
    """Format by role. A tied embedding follows `lm_head`; the router is always float; `vision` is the vision
    tower. `weights.body` sets `mlp` and `experts` together."""

    frequent_tokens: FrequentTokens | None = None
    """Format of the rows of embedding and lm_head that belong to frequent tokens, where it is another than
    the others'; for the CPU. Not set: all have the same."""

    layer_weights: dict[Annotated[int, Field(ge=0)], dict[Role, WeightFormat]] = {}
    """By layer, the formats of roles that differ there, as `--auto-precision` chooses them."""

    carry_over: bool = True
    """Weights that a checkpoint has in codes already keep them, whatever `weights` says, where a kernel takes
    them. False: they are dequantised, and stored as `weights` says."""

    compression: Literal["data-free", "scale-estimation", "awq", "gptq", "gptaq"] = "data-free"
    """How scales and codes of 2- and 4-bit weights are found: from the weights alone, or from activations on
    a calibration text too. For ONNX Runtime that is `gptq`, layer by layer, and `gptaq`, which looks at what
    the codes made so far leave and takes twice the time; for OpenVINO it is NNCF's, with the whole model in
    memory."""

    accuracy_level: Integer = Field(default=0, ge=0, le=4)
    """MatMulNBits' attribute; 4 lets the CPU quantise activations to int8."""

    speculative: bool = False
    """Exports the decoder for several tokens in a run too, for speculative decoding: ONNX Runtime itself,
    without GenAI, must run the provider, and attention write into the cache that it is given (lowering
    `fused`)."""

    mtp: bool = False
    """Exports the checkpoint's MTP head, to draft tokens for speculative decoding, which it implies."""

    prefill_chunk: Literal[16, 32, 64, 128, 256, 512, 1024, 2048]
    """Tokens of a prompt that are processed in one run."""

    context_length: Integer = Field(ge=2)
    """Tokens of prompt and answer together; at most the checkpoint's own limit."""

    threads: ThreadCount = 0
    """Threads that compute on the CPU, unless whoever runs the artifact says otherwise: 0 is one for each
    physical core; `performance` one for each P core, which `qwen-run` finds and other programs do not."""

    spin_us: Integer | None = Field(default=None, ge=0, le=10_000)
    """Microseconds for which threads of ONNX Runtime that wait for the next product keep their cores busy,
    before other work may have them; 0: at once. Not set: as long as ONNX Runtime chooses, for machines that
    do nothing else."""

    hardware: Hardware
    """Memory, bandwidth, and how to recognise the machine."""

    quality: Quality
    """The quality bar."""

    @property
    def kv_dtype(self) -> str:
        """Of the KV cache."""
        return self.cache_dtype or self.activation_dtype

    @property
    def weight_bits(self) -> frozenset[int]:
        """Bits a code that every provider of the artifact is known to compute with."""
        if self.backend == BackendName.OPENVINO:
            return frozenset({4, 8})
        return frozenset.intersection(
            *(PROVIDERS[key].weight_bits for key in (self.provider, *self.fallbacks))
        )

    @field_validator("weights")
    @classmethod
    def _every_role(cls, weights: dict[Role, WeightFormat]) -> dict[Role, WeightFormat]:
        if missing := [role for role in ROLES if role not in weights]:
            raise ValueError(f"no weight format for: {', '.join(missing)}")
        return weights

    @field_validator("layer_weights")
    @classmethod
    def _roles_of_layers(
        cls, layers: dict[int, dict[Role, WeightFormat]]
    ) -> dict[int, dict[Role, WeightFormat]]:
        for role in sorted({role for forms in layers.values() for role in forms} & OUTSIDE_LAYERS):
            raise ValueError(f"{role} is in no layer: set weights.{role}")
        return layers

    @field_validator("frequent_tokens", mode="before")
    @classmethod
    def _table_of_frequent_tokens(cls, given: object) -> object:
        if not isinstance(given, dict | FrequentTokens | None):
            raise ValueError('write a table, such as {share=0.05, precision="int8", block_size=128}')
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        if self.cache_dtype not in (None, self.activation_dtype, "int8"):
            raise ValueError(f"cache_dtype must be activation_dtype, {self.activation_dtype}, or int8")
        if self.cache_dtype == "int8":
            self._check_int8_cache()
        self._check_frequent_tokens()
        if self.scale_dtype == "float32" and self.activation_dtype == "float16":
            raise ValueError("scale_dtype must be float16, as the activations are")
        if self.compression not in (compressions := _COMPRESSIONS[self.backend]):
            raise ValueError(
                f"backend {self.backend} has no compression {self.compression}: "
                f"choose {', '.join(compressions[:-1])} or {compressions[-1]}"
            )
        if self.spin_us is not None and self.backend == BackendName.OPENVINO:
            raise ValueError(
                "spin_us is for ONNX Runtime: leave it off with OpenVINO, which has no such choice"
            )
        if self.lowering not in (known := PROVIDERS[self.provider].lowerings):
            raise ValueError(
                f"provider {self.provider} has no kernels for lowering {self.lowering}: "
                f"set lowering to {' or '.join(sorted(known))}"
            )
        for role, form in self._formats():
            if form.bits is not None and form.bits not in self.weight_bits:
                raise ValueError(self._no_kernel(role, form))
        if self.layer_weights and self.backend == BackendName.OPENVINO:
            raise ValueError("layer_weights is for ONNX Runtime: leave it off with OpenVINO")
        for option, setting in self.provider_options.items():
            if fault := option_fault(self.provider, option, setting):
                raise ValueError(fault)
        return self

    def _check_frequent_tokens(self) -> None:
        asked = self.frequent_tokens is not None and self.frequent_tokens.share > 0
        ran = self.backend == BackendName.ONNX and {self.provider, *self.fallbacks} == {CPU.key}
        if asked and not ran:
            raise ValueError("frequent_tokens has run on provider cpu alone: set frequent_tokens.share=0")

    def _check_int8_cache(self) -> None:
        without = [
            PROVIDERS[key].title
            for key in (self.provider, *self.fallbacks)
            if not PROVIDERS[key].int8_cache or self.lowering not in PROVIDERS[key].lowerings
        ]
        if self.backend == BackendName.OPENVINO:
            raise ValueError(
                "cache_dtype int8 is for backend onnx: OpenVINO chooses its cache's dtype itself"
            )
        if self.lowering != "fused":
            raise ValueError("cache_dtype int8 needs GroupQueryAttention: set lowering to fused")
        if without:
            raise ValueError(f"cache_dtype int8 has run on no {' or '.join(without)}: leave it off")

    def _formats(self) -> Iterator[tuple[str, WeightFormat]]:
        """(field, format) of every format in the recipe."""
        yield from ((f"weights.{role}", form) for role, form in self.weights.items())
        if self.frequent_tokens:
            yield "frequent_tokens", self.frequent_tokens
        for layer, forms in self.layer_weights.items():
            yield from ((f"layer_weights.{layer}.{role}", form) for role, form in forms.items())

    def _no_kernel(self, field: str, form: WeightFormat) -> str:
        advice = f"set {field} to {' or '.join(f'int{bits}' for bits in sorted(self.weight_bits))}"
        if self.backend == BackendName.OPENVINO:
            return f"backend openvino takes no {form.precision} weights: {advice}"
        without = next(
            key for key in (self.provider, *self.fallbacks) if form.bits not in PROVIDERS[key].weight_bits
        )
        return f"provider {without} has no proven kernel for {form.precision} weights: {advice}"


def load_profile(source: str, overrides: Iterable[str] = ()) -> Profile:
    """A shipped profile by name, or the user's own by the path of a file that ends in `.toml`.

    Args:
        overrides: `field=value` each, with dots into tables: `weights.mlp=int8`, `context_length=65536`.

    Raises:
        UserError: there is no such profile (the message has the nearest name), or a field is missing, unknown
            or out of range.
    """
    path = Path(source)
    if path.suffix.lower() == ".toml":
        return parse_profile(path.stem, read_text(path, f"the profile {path}"), overrides)
    if path.exists() and path.name != source:
        raise UserError(f"{path} is no profile: give a file whose name ends in .toml")
    return parse_profile(source, shipped_text(source), overrides)


def parse_profile(name: str, text: str, overrides: Iterable[str] = ()) -> Profile:
    """A profile from TOML text.

    Raises:
        UserError: it is not TOML, extends what is not shipped, or a field is missing, unknown or out of
            range; names the first one.
    """
    fields = read_fields(name, text)
    for override in overrides:
        fields = merged(fields, _override(override))
    if "name" in fields:
        raise UserError(f"profile '{name}', field 'name': leave it off: a profile is called as its file is")
    try:
        return Profile(**{**fields, "name": name})
    except ValidationError as error:
        field, message = first_fault(error, Profile)
        where = f"profile '{name}', field '{field}'" if field else f"profile '{name}'"
        raise UserError(f"{where}: {message}") from error


def _override(text: str) -> dict[str, Any]:
    """`a.b=1` as {"a": {"b": 1}}; the value is TOML, or else a plain string."""
    key, equals, raw = text.partition("=")
    if not (equals and all(key.split("."))):
        raise UserError(f"'{text}' sets nothing: write field=value, such as weights.body=int8")
    try:
        found = parse_toml(f"value = {raw}", "a value")
    except UserError:
        found = {}
    value: Any = found["value"] if len(found) == 1 else raw  # one line is one value
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
