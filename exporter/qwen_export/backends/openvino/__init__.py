"""The other backend: OpenVINO IR by optimum-intel, its weights compressed by NNCF, for openvino-genai.

Needs `qwen-edge[openvino]`. Nothing here is imported until a profile asks for this backend.
"""
