"""What an artifact is made for: ONNX Runtime or OpenVINO."""
