"""What an artifact lost: its next-token distributions against the checkpoint's own, on real text.

Two things are compared with the reference model in float32: the artifact as the runtime executes it, and the
reference model with the artifact's stored weights in it. The second tells how much of the loss the weights
explain, and which role and layer; the rest is the execution provider's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen_export import reference
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.backends.protocol import ArtifactTensor
from qwen_export.checkpoint.tensors.tensor import CheckpointTensor
from qwen_export.reference import Weights, log_softmax
from qwen_export.verify.running import Runner, Started, Timing

WINDOW = 256  # tokens of one text
_PROBED = 1  # texts that roles and layers are compared on, one by one
_ALL = "all"


@dataclass
class Loss:
    """Sums over positions of one comparison with the reference.

    Attributes:
        divergence: KL divergence in nats of each position, a list for each text.
        agreed: whether both find the same token the likeliest, likewise.
        nll: negative log-likelihood of the token that really came next, likewise.
    """

    divergence: list[np.ndarray] = field(default_factory=list)
    agreed: list[np.ndarray] = field(default_factory=list)
    nll: list[np.ndarray] = field(default_factory=list)

    def add(self, expected: np.ndarray, found: np.ndarray, following: np.ndarray) -> None:
        """One text: log-probabilities [positions, vocab] of both, and the tokens that came next."""
        self.divergence.append((np.exp(expected) * (expected - found)).sum(-1))
        self.agreed.append(expected.argmax(-1) == found.argmax(-1))
        self.nll.append(-found[np.arange(len(following)), following])

    @property
    def kl_divergence(self) -> float:
        """Mean over positions, in nats."""
        return float(np.mean(self.divergence))

    @property
    def top1_agreement(self) -> float:
        return float(np.mean(self.agreed))

    @property
    def perplexity(self) -> float:
        return float(np.exp(np.mean(self.nll)))

    @property
    def by_position(self) -> list[float]:
        """KL divergence after each number of tokens, mean over texts."""
        return [float(value) for value in np.mean(self.divergence, axis=0)]


@dataclass
class Measured:
    """What was found.

    Attributes:
        reference_perplexity: of the checkpoint.
        weights: the stored weights in the reference model.
        executed: the artifact in the runtime; None where it was not run.
        by_role: KL divergence in nats of the reference model with only one role's weights as stored.
        by_layer: (layer, role) -> relative error of the layer's output with that role's weights as stored.
        growth: how many times larger each layer of the checkpoint makes its hidden states.
        started: where and how the artifact was loaded; None where it was not run.
        timings: how long the runtime took for each text.
        answering: the perplexity that the path which answers finds, where it is not the one that gave
            `executed`.
    """

    reference_perplexity: float
    weights: Loss
    executed: Loss | None
    by_role: dict[str, float]
    by_layer: dict[tuple[int, str], float]
    growth: list[float]
    started: Started | None
    timings: list[Timing]
    answering: float | None = None


class _Streams:
    """Hidden states of the texts as several sets of weights make them, taken through the layers together."""

    def __init__(self, config: TextConfig, sets: Mapping[str, Weights], ids: np.ndarray) -> None:
        self.config, self.sets = config, sets
        counts = {name: len(ids) if name in ("", _ALL) else _PROBED for name in sets}
        self.hidden = {
            name: reference.embed(config, weights, ids[: counts[name]]) for name, weights in sets.items()
        }

    def step(self, index: int) -> Iterator[None]:
        """Take every stream through layer `index`."""
        for name, weights in self.sets.items():
            self.hidden[name] = reference.layer(self.config, weights, index, self.hidden[name])
            yield


def prompt_of(length: int) -> int:
    """How many of a text's tokens are read as a prompt; the others come one by one."""
    return length * 5 // 8


def steps(config: TextConfig, stored: Mapping[str, ArtifactTensor], texts: int) -> int:
    """How often `measure` will call `advance`."""
    roles = quantised_roles(stored)
    local = sum(len(_roles_in(stored, index, roles)) for index in range(config.num_hidden_layers))
    return config.num_hidden_layers * (2 + len(roles)) + local + texts


def quantised_roles(stored: Mapping[str, ArtifactTensor]) -> list[str]:
    return sorted({tensor.role for tensor in stored.values() if tensor.quantised})


def _roles_in(stored: Mapping[str, ArtifactTensor], layer: int, roles: Sequence[str]) -> list[str]:
    within = {tensor.role for name, tensor in stored.items() if name.startswith(f"model.layers.{layer}.")}
    return [role for role in roles if role in within]


def measure(
    config: TextConfig,
    tensors: Mapping[str, CheckpointTensor],
    stored: Mapping[str, ArtifactTensor],
    ids: np.ndarray,
    start: Callable[[], Runner | None],
    advance: Callable[[], None],
) -> Measured:
    """Compare on `ids` int64 [texts, tokens].

    Args:
        tensors: the checkpoint's.
        stored: the artifact's, of the same names.
        start: gives the loaded artifact, or None; called once the layers are through.
        advance: called after each of `steps`.
    """
    prompt = prompt_of(ids.shape[1])
    roles = quantised_roles(stored)
    sets = {"": Weights(tensors), _ALL: Weights({**tensors, **stored})}
    for role in roles:
        sets[role] = Weights({**tensors, **_of(stored, role)})
    streams = _Streams(config, sets, ids)
    by_layer: dict[tuple[int, str], float] = {}
    growth: list[float] = []
    for index in range(config.num_hidden_layers):
        before = streams.hidden[""][:_PROBED]
        for _ in streams.step(index):
            advance()
        after = streams.hidden[""][:_PROBED]
        growth.append(_relative(after, before))
        for role in _roles_in(stored, index, roles):
            found = reference.layer(config, sets[role], index, before)
            by_layer[index, role] = _relative(found - after, after)
            advance()

    def log_probabilities(name: str, text: int) -> np.ndarray:
        return log_softmax(reference.logits(config, sets[name], streams.hidden[name][text, prompt - 1 :]))

    runner = start()
    own, weights, timings = Loss(), Loss(), []
    answering: list[np.ndarray] = []
    executed = Loss() if runner else None
    by_role: dict[str, list[float]] = {role: [] for role in roles}
    for text, tokens in enumerate(ids):
        following = tokens[prompt:]
        expected = log_probabilities("", text)
        own.add(expected, expected, following)
        weights.add(expected, log_probabilities(_ALL, text), following)
        if runner and executed:
            logits, timing = runner.score(tokens.tolist(), prompt)
            executed.add(expected, log_softmax(logits), following)
            timings.append(timing)
            if runner.started.scores_apart:
                answering.append(-runner.answering(tokens.tolist())[prompt - 1 :])
        for role in roles if text < _PROBED else ():
            loss = Loss()
            loss.add(expected, log_probabilities(role, text), following)
            by_role[role].append(loss.kl_divergence)
        advance()
    means = {role: float(np.mean(values)) for role, values in by_role.items()}
    started = runner.started if runner else None
    answered = float(np.exp(np.mean(answering))) if answering else None
    return Measured(own.perplexity, weights, executed, means, by_layer, growth, started, timings, answered)


def _of(stored: Mapping[str, ArtifactTensor], role: str) -> dict[str, ArtifactTensor]:
    return {name: tensor for name, tensor in stored.items() if tensor.role == role}


def _relative(values: np.ndarray, base: np.ndarray) -> float:
    """The norm of `values` by that of `base`; a number even where `base` is zero."""
    return float(np.linalg.norm(values) / max(np.linalg.norm(base), np.finfo(np.float32).tiny))
