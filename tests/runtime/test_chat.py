"""`qwen-run` as a chat, in a terminal and through a pipe."""

from __future__ import annotations

import json
from pathlib import Path

from qwen_profiles.schema import load_profile
from qwen_runtime import Model, Sampling

from benchmarks.support.checkpoints import TINY_VL
from tests.checkpoints.drawings import drawing
from tests.support.commands import RUN, Terminal, run
from tests.support.exported import Exported

QUESTION = [{"role": "user", "content": "What is assert?"}]
GREEDY = Sampling(temperature=0)


def test_chat_in_a_terminal(cpu_artifact: Path) -> None:
    # Hot enough that every token is as likely as the end, so an answer is long: more than a terminal
    # holds, and so it waits for who reads.
    hot = ["--temperature", "1000", "--top-k", "2048", "--top-p", "1", "--seed", "2"]
    terminal = Terminal([*RUN, str(cpu_artifact), *hot])
    terminal.wait_for("> ")
    # Python takes notice of one that comes between its prompt and the reading of a line at the next.
    terminal.type("\x03")
    terminal.wait_for("/help lists", every_second="\x03")
    terminal.wait_for("> ")
    terminal.type("What is assert?\n")
    terminal.wait_for(r"assert\?\r\n[\s\S]{30}")
    terminal.type("\x03")
    terminal.wait_for(r"\(stopped\)")
    terminal.wait_for(r"\d+ tokens, \d+\.\d a second, first after")
    terminal.wait_for("> ")
    terminal.type("\x1b[A")  # the arrow that brings the last line back
    terminal.wait_for("What is assert")
    terminal.type("\x15/clear\n")
    terminal.wait_for("> ")
    assert terminal.leave() == 0


def test_chat_survives_its_first_message(cpu_artifact: Path) -> None:
    terminal = Terminal([*RUN, str(cpu_artifact), "--system", "word " * 9000, "--max-tokens", "5"])
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    terminal.wait_for(r"shorten it; /clear")
    terminal.wait_for("> ")
    terminal.type("/system Be brief.\n")
    terminal.wait_for("> ")
    terminal.type("Hi\n")
    terminal.wait_for(r"5 tokens, ")
    assert terminal.leave() == 0


def test_chat_prompt_stays_while_a_line_is_edited(cpu_artifact: Path) -> None:
    """Readline must know how wide the prompt is, or it writes over it."""
    terminal = Terminal([*RUN, str(cpu_artifact)])
    terminal.wait_for("> ")
    terminal.type("abc\x01X")  # to the beginning of the line, where X goes
    terminal.wait_for("abc\b\b\bXabc")
    terminal.type("\x05\x15")  # the end would only delete a character of it
    assert terminal.leave() == 0


def test_chat_remembers(cpu_artifact: Path, model: Model) -> None:
    """The second answer is that to the whole conversation; after /clear it is forgotten."""
    first = "".join(model.generate(QUESTION, max_tokens=12, sampling=GREEDY))
    history = [*QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    second = "".join(model.generate(history, max_tokens=12, sampling=GREEDY))
    alone = "".join(model.generate(history[-1:], max_tokens=12, sampling=GREEDY))
    assert second != alone
    typed = "What is assert?\nWhy?\n\n/clear\nWhy?\n/exit\nnever read\n"
    found = run(str(cpu_artifact), "--temperature", "0", "--max-tokens", "12", stdin=typed)
    assert found.returncode == 0
    assert found.stdout.split("leaves.\n")[1] == f"> {first}\n> {second}\n> > > {alone}\n> "


def test_chat_commands(cpu_artifact: Path, model: Model, tmp_path: Path) -> None:
    """A message of two lines under another system message, saved as it was answered."""
    saved = tmp_path / "saved.json"
    typed = (
        "/system Be brief.\nWhat is\\\nassert?\n/image photo.jpg\n/save\n"
        f"/save {tmp_path}/no/where\n/save {saved}\n/help\n/exit\n"
    )
    found = run(str(cpu_artifact), "--temperature", "0", "--max-tokens", "12", stdin=typed)
    assert found.returncode == 0
    messages = json.loads(saved.read_text())
    assert messages[:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is\nassert?"},
    ]
    answer = "".join(model.generate(messages[:2], max_tokens=12, sampling=GREEDY))
    assert messages[2] == {"role": "assistant", "content": answer}
    for text in (
        "has no vision tower",
        "write the file's name",
        "cannot write",
        "3 messages are in",
        "/image",
    ):
        assert text in found.stdout.replace("\n", " ")


def test_chat_about_an_image(exported: Exported, tmp_path: Path) -> None:
    item = drawing(1_000_000_003)
    item.image.save(tmp_path / "drawing.png")
    (tmp_path / "none.png").write_bytes(b"none")
    artifact = exported(TINY_VL, load_profile("cpu"))
    typed = (
        f"/image {tmp_path}/nowhere.png\n/image {tmp_path}/none.png\n{item.question}\n"
        f"/image {tmp_path}/drawing.png\n{item.question}\n"
    )
    found = run(str(artifact), "--temperature", "0", stdin=typed)
    assert found.returncode == 0
    text = found.stdout.replace("\n", " ")
    assert "there is no file" in text and "/clear forgets the conversation" in text
    assert item.answer in text


def test_chat_goes_on_when_the_context_is_full(cpu_artifact: Path) -> None:
    typed = f"What is assert?\n{'word ' * 9000}\nWhy?\n"
    found = run(str(cpu_artifact), "--temperature", "0", "--max-tokens", "4", stdin=typed)
    assert found.returncode == 0
    assert "and the context is 8192: shorten it; /clear forgets" in found.stdout.replace("\n", " ")
    assert found.stdout.count("> ") == 4
    alone = run(str(cpu_artifact), "--max-tokens", "4", stdin=f"{'word ' * 9000}\n")
    assert alone.returncode == 2
