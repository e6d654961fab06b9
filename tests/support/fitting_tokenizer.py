"""The trained checkpoint's tokenizer for models of fewer tokens."""

from __future__ import annotations

import json
from pathlib import Path


def fit_tokenizer(folder: Path, vocab_size: int) -> None:
    """Cut the vocabulary of the tokenizer in `folder` to `vocab_size`, special tokens at its end."""
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, config = (json.loads(file.read_text(encoding="utf-8")) for file in (path, config_path))
    model, added = content["model"], content["added_tokens"]
    cut = len(model["vocab"]) + len(added) - vocab_size
    if cut <= 0:
        return
    kept = len(model["vocab"]) - cut
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < kept}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for token in added:
        token["id"] -= cut
    decoder = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {str(int(number) - cut): token for number, token in decoder.items()}
    path.write_text(json.dumps(content), encoding="utf-8")
    config_path.write_text(json.dumps(config), encoding="utf-8")
