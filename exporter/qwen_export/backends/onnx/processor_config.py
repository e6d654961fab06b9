"""ONNX Runtime GenAI's processor_config.json, for models with a vision tower."""

from __future__ import annotations

from typing import Any

from qwen_export.architecture.vision import VisionConfig


def processor_config(vision: VisionConfig) -> dict[str, Any]:
    """What happens to an image, as steps of ONNX Runtime Extensions' image processor.

    `width` and `height` of Resize are required and unused: `smart_resize` goes by the pixels.
    """
    processor = vision.processor
    patches = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("ConvertRGB", {}),
        (
            "Resize",
            {
                "width": 960,
                "height": 672,
                "smart_resize": 1,
                "min_pixels": processor.size.shortest_edge,
                "max_pixels": processor.size.longest_edge,
                **patches,
            },
        ),
        ("Rescale", {"rescale_factor": processor.rescale_factor}),
        ("Normalize", {"mean": processor.image_mean, "std": processor.image_std, "qwen3_vl": 1}),
        ("PatchImage", {**patches, "temporal_patch_size": vision.temporal_patch_size}),
    ]
    transforms = [
        {"operation": {"name": kind.lower(), "type": kind, "attrs": attributes}} for kind, attributes in steps
    ]
    return {"processor": {"name": "qwen3_vl_image_processor", "transforms": transforms}}
