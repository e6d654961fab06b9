"""Pictures of a verification's report."""

from __future__ import annotations

import warnings

import pytest
from matplotlib.figure import Figure
from qwen_export.verify.plots import draw_layers


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_layers_without_any_error_are_drawn_without_a_warning(error: float) -> None:
    """Of a checkpoint whose own codes are kept; there is no logarithm of nothing."""
    figure = Figure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_layers(figure, {"layers": [{"role": "mlp", "layer": i, "error": error} for i in range(2)]})
        figure.canvas.draw()
    assert figure.axes[0].get_yscale() == ("log" if error else "linear")
