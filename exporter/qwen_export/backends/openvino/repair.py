"""What an IR from optimum-intel needs before it answers rightly wherever it runs."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np


def repair(model: Any) -> Any:
    """Repair an openvino.Model; returns it."""
    connect_positions(model)
    widen(model)
    model.validate_nodes_and_infer_types()
    return model


def connect_positions(model: Any) -> None:
    """Let the rotary embedding take its places from the input `position_ids`.

    optimum-intel 2.2 drops that input of text models, and the IR counts on from the length of its cache. The
    paged pipeline has no such cache: all tokens of a prompt would get the same place.
    """
    from openvino import opset13

    places = next((node for node in model.get_parameters() if "position_ids" in node.output(0).names), None)
    if places is None or places.output(0).get_target_inputs():
        return
    waves = [node for node in model.get_ops() if node.get_type_name() in ("Sin", "Cos")]
    expanded = {node.get_friendly_name(): node for node in map(_expanded, waves)}
    for node in expanded.values():  # [streams, batch, tokens], from one row
        converted = opset13.convert(places, node.input(0).get_element_type())
        node.input(0).replace_source_output(opset13.unsqueeze(converted, 0).output(0))


def _expanded(wave: Any) -> Any:
    """The Broadcast of places to time, height and width that `wave`, a sine or cosine, is computed from."""
    product = _before(wave, "MatMul")  # of frequencies and places
    return _before(product.input_value(1).get_node(), "Broadcast")


def _before(node: Any, kind: str) -> Any:
    """The nearest node of this kind that `node` is computed from."""
    waiting = deque([node])
    while waiting:
        found = waiting.popleft()
        if found.get_type_name() == kind:
            return found
        waiting.extend(value.get_node() for value in found.input_values())
    raise ValueError(f"{node.get_friendly_name()} is not of the form that was known when this was written")


def widen(model: Any) -> None:
    """Replace every bfloat16 constant by a float32 one.

    OpenVINO's CPU plugin (2026.3.1 to 2026.4.1) ends the process where it converts one on a CPU without
    AVX-512, as Intel's laptops are: oneDNN's reorder knows bfloat16 only there. Little is left in bfloat16
    after compression, unless the recipe keeps a large role as float.
    """
    import openvino
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.bf16:
            continue
        values = (node.data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        wide = opset13.constant(values, openvino.Type.f32)
        wide.set_friendly_name(node.get_friendly_name())
        for target in node.output(0).get_target_inputs():
            user = target.get_node()
            if user.get_type_name() == "Convert" and user.get_element_type() == openvino.Type.f32:
                user.output(0).replace(wide.output(0))
            else:
                target.replace_source_output(opset13.convert(wide, "bf16").output(0))
