"""What a measurement says in words: whether it passes, what costs most, and what to set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median, median_low

from qwen_profiles.schema import Profile

from qwen_export.backends.registry import export_backend
from qwen_export.verify.measure import Measured
from qwen_export.verify.transformers_reference import Agreement

# A role's error in one layer is its own affair when it is so many times that role's usual one.
_ODD_ERROR = 5.0
_LARGEST_ERROR = 0.3  # INT4 of any sane weights stays below
# Healthy models make their hidden states much larger at once too, in early layers.
_ODD_GROWTH = 30.0
# Of the loss, what the weights leave unexplained must not be more than this.
_EXPLAINED = 0.5
_BETTER = {"int2": "int4", "int4": "int8", "int8": "float"}


def passes(measured: Measured, profile: Profile) -> bool:
    bar, loss = profile.quality, measured.executed or measured.weights
    above = loss.kl_divergence <= bar.max_kl_divergence and loss.top1_agreement >= bar.min_top1_agreement
    return above and _apart(measured) <= bar.max_kl_divergence


def _apart(measured: Measured) -> float:
    """Nats a token by which the path that answers does worse than the one whose logits were compared."""
    if measured.answering is None or measured.executed is None:
        return 0.0
    return math.log(measured.answering / measured.executed.perplexity)


def findings(measured: Measured, profile: Profile, settable: Mapping[str, str]) -> list[str]:
    """Sentences, the likeliest cause first.

    Args:
        settable: role -> int2, int4 or int8, of the roles that may be advised to have more.
    """
    causes = [*_odd_layers(measured), *_provider(measured, profile)] or _odd_checkpoint(measured)
    return [*causes, *_costliest(measured, settable)]


def disagreement(proof: Agreement | None) -> list[str]:
    """Where transformers computes something else than the reference: then nothing else counts."""
    if proof is None or proof.agrees:
        return []
    return [
        f"transformers {proof.versions['transformers']} computes other logits than the reference: a cosine "
        f"of {proof.cosine:.4f}, a KL divergence of {proof.kl_divergence:.3g}. All figures here are against "
        "the reference, so they prove nothing: report this, with the checkpoint's name."
    ]


def _odd_layers(measured: Measured) -> list[str]:
    """Layers whose weights are not the checkpoint's, the worst first."""
    found = []
    for (layer, role), error in sorted(measured.by_layer.items(), key=lambda item: -item[1]):
        usual = median_low(other for (_, name), other in measured.by_layer.items() if name == role)
        if error > _LARGEST_ERROR and error > _ODD_ERROR * usual:
            found.append(
                f"Layer {layer} is not the checkpoint's: its {role} weights change the layer's output by "
                f"{error:.0%}, where that role's usual change is {usual:.1%}. Export again, and compare the "
                "checkpoint's files with their source."
            )
    return found


def _provider(measured: Measured, profile: Profile) -> list[str]:
    """The runtime's arithmetic, where the weights do not explain the loss."""
    if measured.executed is None:
        return []
    if _apart(measured) > profile.quality.max_kl_divergence:
        return [
            f"The pipeline that answers has a perplexity of {measured.answering:.2f}, where the same weights "
            f"run for their logits have {measured.executed.perplexity:.2f}: its kernels compute otherwise on "
            "this device. Try another --provider, or another version of OpenVINO."
        ]
    beyond = measured.executed.kl_divergence - measured.weights.kl_divergence
    if beyond <= _EXPLAINED * profile.quality.max_kl_divergence:
        return []
    setting = export_backend(profile.backend).exact_setting(profile)
    return [
        f"The weights explain a KL divergence of {measured.weights.kl_divergence:.4f} of "
        f"{measured.executed.kl_divergence:.4f}: the rest is how the execution provider computes. Try "
        f"another --provider, or export with --set {setting}."
    ]


def _odd_checkpoint(measured: Measured) -> list[str]:
    """A layer of the checkpoint itself that drowns what came before it."""
    worst = max(range(len(measured.growth)), key=measured.growth.__getitem__)
    if measured.growth[worst] < _ODD_GROWTH * median(measured.growth):
        return []
    return [
        f"Layer {worst} of the checkpoint makes its hidden states {measured.growth[worst]:.0f} times larger, "
        f"where the usual is {median(measured.growth):.1f}: every error before it and in it counts more. Is "
        "the checkpoint damaged there?"
    ]


def _costliest(measured: Measured, settable: Mapping[str, str]) -> list[str]:
    if not measured.by_role:
        return []
    role = max(measured.by_role, key=measured.by_role.__getitem__)
    if not (total := sum(measured.by_role.values())):  # all codes are the checkpoint's own
        return []
    sentence = (
        f"The role that costs most is {role}: alone it is a KL divergence of {measured.by_role[role]:.4f}, "
        f"{measured.by_role[role] / total:.0%} of all roles' sum."
    )
    if role in settable:
        sentence += f" --set weights.{role}={_BETTER[settable[role]]} would spare most of it."
    return [sentence]
