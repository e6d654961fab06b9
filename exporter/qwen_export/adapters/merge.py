"""A checkpoint with adapters merged into its tensors, which are still read row by row.

One adapter after the other, each with its own scaling, as PEFT's merge_and_unload does it: for LoRA the
result is W + weight_1 scaling_1 B_1 A_1 + ..., which add_weighted_adapter calls "cat". DoRA's norms are those
of the checkpoint's own rows with that adapter's product, whatever was merged before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qwen_common.errors import UserError

from qwen_export.adapters.adapter import Adapter
from qwen_export.adapters.places import Placed, place
from qwen_export.adapters.updates import MergedTensor, Replacement, TokenRows, Update
from qwen_export.architecture.models.qwen3_5 import EMBEDDING, LM_HEAD
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.checkpoint.head import settle_head
from qwen_export.checkpoint.tensors.fused import join_fused, split_fused
from qwen_export.checkpoint.tensors.plain import FLOATS, PlainTensor

_NAMED = 3  # modules that a note names
_OWN_FILES = ("chat_template.jinja", "tokenizer.json")


def with_adapters(checkpoint: Checkpoint, given: Sequence[str]) -> Checkpoint:
    """`checkpoint` with the adapters `FOLDER[=weight]` merged into it, in this order.

    Reads no weight but embedding and lm_head, where the model ties them and an adapter changes one.

    Raises:
        UserError: as `Adapter.open` and `place`; or one adapter has in full what another one changes.
    """
    if not given:
        return checkpoint
    adapters = [Adapter.open(one) for one in given]
    config = checkpoint.config
    tensors = join_fused(checkpoint.tensors, config.fused)
    tied = config.tie_word_embeddings and LM_HEAD not in tensors
    if tied:
        tensors[LM_HEAD] = tensors[EMBEDDING]
    unknown = set(checkpoint.unknown())
    known = {name: tensor for name, tensor in tensors.items() if name not in unknown}
    changes: dict[str, list[tuple[Adapter, Update]]] = {}
    notes = []
    for adapter in adapters:
        placed = place(adapter, known, tied)
        tensors |= placed.bases
        for name, update in placed.updates:
            before = changes.setdefault(name, [])
            _refuse_clash(name, (adapter, update), before)
            before.append((adapter, update))
        notes += _notes(checkpoint, adapter, placed)
    for name, found in changes.items():
        base = tensors[name]
        if isinstance(base, PlainTensor) and base.dtype not in FLOATS:
            continue  # `Checkpoint.check` says what is wrong with it
        tensors[name] = MergedTensor(base, name, tuple(update for _, update in found))
    if tied and changes.get(EMBEDDING) == changes.get(LM_HEAD):
        del tensors[LM_HEAD]
    elif tied and (config := settle_head(config, tensors)) is not checkpoint.config:
        notes.append(
            "an adapter changes one of lm_head and embedding, or both apart, which the model ties: they are "
            "exported as two tensors"
        )
    return replace(
        checkpoint,
        config=config,
        tensors=split_fused(tensors, config.fused),
        notes=(*checkpoint.notes, *notes),
        adapters=tuple(adapter.described() for adapter in adapters),
        adapter_folders=tuple(adapter.root for adapter in adapters),
    )


def _refuse_clash(name: str, found: tuple[Adapter, Update], before: Iterable[tuple[Adapter, Update]]) -> None:
    adapter, update = found
    for other, its in before:
        of_tokens = isinstance(update, TokenRows) and isinstance(its, TokenRows)
        if isinstance(update, Replacement) or isinstance(its, Replacement) or of_tokens:
            raise UserError(
                f"the adapters {other.name} and {adapter.name} both change {name}, and one has it in full: "
                "they cannot be merged together"
            )


def _notes(checkpoint: Checkpoint, adapter: Adapter, placed: Placed) -> list[str]:
    notes = []
    base = adapter.config.base_model_name_or_path
    names = {checkpoint.root.name, _last(checkpoint.source)}
    if base and _last(base) not in names:
        notes.append(
            f"adapter {adapter.name} says that it is for {base}, and is merged into {checkpoint.source}"
        )
    if placed.missing:
        count, some = len(placed.missing), ", ".join(placed.missing[:_NAMED])
        more = f" and {count - _NAMED} more" if count > _NAMED else ""
        notes.append(
            f"adapter {adapter.name} has no tensors for modules that its target_modules name: {some}{more}: "
            "they stay as in the checkpoint"
        )
    for file in _OWN_FILES:
        own, ours = adapter.root / file, checkpoint.root / file
        if own.is_file() and not (ours.is_file() and own.read_bytes() == ours.read_bytes()):
            notes.append(
                f"adapter {adapter.name} has a {file} of its own, and the checkpoint's is taken: put it into "
                "the checkpoint's folder if the model was trained with it"
            )
    return notes


def _last(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]
