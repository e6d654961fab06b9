"""A Hugging Face checkpoint: its files, and the forms in which they store a weight."""

from qwen_export.checkpoint.checkpoint import Checkpoint as Checkpoint
