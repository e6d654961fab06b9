"""GGUF files of llama.cpp's `qwen35` and `qwen35moe`, presented as a `Checkpoint`."""
