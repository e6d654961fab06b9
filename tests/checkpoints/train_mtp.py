"""Train a multi-token-prediction head for the frozen tiny-dense checkpoint.

    python tests/checkpoints/train_mtp.py -o tests/checkpoints/tiny-dense-mtp

On the text that the checkpoint was trained on, the head learns what the checkpoint itself would predict. It
begins as the checkpoint's last attention layer.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from corpus import END_OF_TEXT, HELD_OUT, chats, docstrings, token_stream
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.functional import kl_div, log_softmax
from train import HERE, SEQUENCE, Variant, batches, optimizer, rate
from transformers import Qwen3_5ForCausalLM

sys.path.insert(0, str(HERE.parent))
from tests.support.mtp import MtpHead

BASE = HERE / "tiny-dense"
LAST_ATTENTION = 7
ROWS = 8


def loss_and_agreement(
    head: MtpHead, model: Qwen3_5ForCausalLM, batch: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """KL divergence from the checkpoint's own next prediction, and how often both would choose alike."""
    with torch.no_grad():
        hidden = model.model(input_ids=batch).last_hidden_state
        expected = log_softmax(model.lm_head(hidden[:, 1:]).float(), dim=-1)
    found = log_softmax(head(model, batch[:, 1:], hidden[:, :-1]).float(), dim=-1)
    loss = kl_div(found, expected, reduction="sum", log_target=True) / found[..., 0].numel()
    return loss, (found.argmax(-1) == expected.argmax(-1)).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = Qwen3_5ForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    reference = [topics[name] for name in sorted(set(topics) - set(HELD_OUT))]
    stream = token_stream(tokenizer, [*reference * 3, *docstrings()], END_OF_TEXT)
    talk = token_stream(tokenizer, list(chats()), "")
    held_out = token_stream(tokenizer, [(HERE / "eval.txt").read_text(encoding="utf-8")], "")

    head = MtpHead(model)
    head.layers[0].load_state_dict(model.model.layers[LAST_ATTENTION].state_dict())
    with torch.no_grad():  # the sum of both halves
        head.fc.weight.copy_(torch.eye(model.config.hidden_size).repeat(1, 2))
    variant = Variant(lambda _: model, arguments.steps, peak_rate=3e-3, chat_rows=ROWS // 2, text_rows=ROWS)
    adam = optimizer(head)
    started = time.perf_counter()
    windows = batches(stream, talk, variant, arguments.seed)
    for step in range(arguments.steps):
        batch = next(windows)
        for group in adam.param_groups:
            group["lr"] = rate(variant, step, arguments.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss, agreement = loss_and_agreement(head, model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == arguments.steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step}: {loss.item():.3f} nats, {agreement:.1%} alike, {seconds:.0f} s", flush=True)
        if step % 100 == 99 or step == arguments.steps - 1:
            save(head, arguments.output)
    unseen = torch.from_numpy(held_out[: SEQUENCE * 16].reshape(16, SEQUENCE))
    with torch.no_grad():
        loss, agreement = loss_and_agreement(head, model, unseen)
    print(f"held out: {loss.item():.3f} nats from the checkpoint's predictions, {agreement:.1%} alike")


def save(head: MtpHead, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"mtp.{name}": value.detach().to(torch.bfloat16).contiguous()
        for name, value in head.state_dict().items()
    }
    save_file(tensors, folder / "mtp.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
