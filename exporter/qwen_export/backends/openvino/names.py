"""Which of the checkpoint's tensors a node of an IR uses, by the module that it was traced from."""

from __future__ import annotations

import re

# IRs that are made of one module, which the names of their nodes do not say.
_MODULES = {
    "openvino_text_embeddings_model": "model.embed_tokens",
    "openvino_vision_embeddings_model": "model.visual.patch_embed",
    "openvino_vision_embeddings_pos_model": "model.visual.pos_embed",
    "openvino_vision_embeddings_merger_model": "model.visual",
}
_INSIDE = re.compile(r"__module((?:\.\w+)*)/")
_TEXT = re.compile(r"(layers\.\d+\.[\w.]+|embed_tokens|lm_head)/")
# Products with the experts of one layer: by the end of their node's name, the checkpoint's tensor, and which
# of the parts that stand after each other in it.
_EXPERTS = {"MatMul": ("gate_up_proj", 0), "MatMul_1": ("gate_up_proj", 1), "MatMul_2": ("down_proj", 0)}


def tensor_of(node: str, ir: str = "") -> tuple[str, int] | None:
    """The checkpoint's tensor that `node` uses, if any, and which part of it; None for other nodes.

    The name is a guess from the node's: most nodes of a module use none of its weights.

    Args:
        node: friendly name.
        ir: name of the IR's file, without its ending.
    """
    if ir in _MODULES:
        inside = _INSIDE.match(node)
        return f"{_MODULES[ir]}{inside[1] if inside else ''}.weight", 0
    found = _TEXT.search(node)
    if found is None:
        return None
    module = found[1]
    if "::bmm/" in node:
        tensor, part = _EXPERTS.get(node.rpartition("/")[2], ("", 0))
        return f"model.{module.removesuffix('.experts')}.experts.{tensor}", part
    return f"{'' if module == 'lm_head' else 'model.'}{module}.weight", 0
