"""PEFT's LoRA adapters: read from their folder, and merged into a checkpoint's tensors as they are read."""
