"""GGUF files of llama.cpp's `qwen35`, `qwen35moe` and `qwen3next`, presented as a `Checkpoint`."""
