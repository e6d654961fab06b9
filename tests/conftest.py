import os

# No hub is asked for anything, and transformers' fallbacks to plain PyTorch are what is wanted here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
