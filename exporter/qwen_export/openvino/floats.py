"""bfloat16 constants of an IR as float32.

OpenVINO's CPU plugin (2026.3.1 to 2026.4.1) ends the process where it converts one on a CPU without AVX-512,
as Intel's laptops are: oneDNN's reorder knows bfloat16 only there. Little is left in bfloat16 after
compression, unless the recipe keeps a large role as float.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def widen(model: Any) -> Any:
    """Replace every bfloat16 constant of an openvino.Model; returns the model."""
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
    model.validate_nodes_and_infer_types()
    return model
