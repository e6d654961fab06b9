"""Prefill and decode beside llama.cpp and others, as ratios within one run.

    python -m benchmarks.decode --llama llama-env/bin/python --openvino .venv-openvino/bin/python
                                [--builder] [--json F] [--plot F.png]
    python -m benchmarks.decode --size "35B-A3B, 4 layers" --profiles cpu-int4 --llama llama-env/bin/python
                                --llama-forms Q4_0 Q4_K_M Q2_K
    python -m benchmarks.decode --profiles cpu-int4 --llama llama-env/bin/python --prompt 512 8192 --rounds 3

Random weights of a published geometry, made as they are read (OpenVINO and the builder want them on the
disk), a prompt of each length, tokens decoded greedily after it. Each peer is a process of its own that
stays loaded; the peers take turns, round by round, so that what else the machine does meets them all. A
ratio is taken within a round, and the median of the rounds counts. The bandwidth is that of reading memory
with every core, in the same rounds; a peer's ceiling is that bandwidth by the bytes of the weights that a
token reads.

llama.cpp is another environment, built for this machine:

    python -m venv llama-env
    CMAKE_ARGS="-DGGML_NATIVE=ON" llama-env/bin/pip install llama-cpp-python

On CPUs with AMX, GCC 12 makes a build that crashes (llama.cpp issue 20824); there, without it:

    CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"

Its model is written here with the package gguf: every projection Q4_0, the embedding too. Other forms of
`--llama-forms` are made of that file by llama.cpp itself, which chooses the type of each tensor as it does
for its users. Ratios are to the first form.
OpenVINO's environment is that of docs/testing.md.
Another peer is any command that does what benchmarks/peers/turns.py says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from qwen_export.architecture.models.qwen3_5 import TextConfig
from qwen_export.architecture.models.qwen3_5_moe import MoeTextConfig
from qwen_export.backends.onnx.graphs import build_graphs
from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export
from qwen_profiles.schema import Profile, load_profile
from rich.console import Console
from rich.table import Table

from benchmarks.builder import build, wrap
from benchmarks.export import peak_bytes
from benchmarks.geometry import GEOMETRIES, generated_checkpoint, write_checkpoint
from benchmarks.support.artifacts import Quiet
from benchmarks.support.checkpoints import TINY, copy_tokenizer

PROMPT = 512
LLAMA = "llama.cpp"
LENGTH = "{prompt}"  # in a peer's command
BANDWIDTH = "bandwidth"
SPEEDS = ("prefill", "decode")
# What must stay in memory, and pages of files, which the system may drop and read again.
MEMORY = {"anonymous": "RssAnon", "mapped": "RssFile"}


@dataclass
class Peer:
    """One process that takes turns.

    Attributes:
        bytes: of the weights that a token reads; None: not known, or it is no model.
        facts: what it said of itself.
        turns: what it measured, a round each.
        peak_bytes: the most that was resident.
        memory: bytes after the last turn, of each kind in `MEMORY`.
    """

    name: str
    command: list[str]
    bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def running(self, prompt: int) -> Iterator[None]:
        """Loaded for prompts of `prompt` tokens; what an earlier process measured is forgotten."""
        self.turns = []
        with subprocess.Popen(
            [part.replace(LENGTH, str(prompt)) for part in self.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to deal with
        ) as process:
            assert process.stdin and process.stdout
            self._process, self._to, self._from = process, process.stdin, process.stdout
            try:
                self.facts = self._heard()
                yield
            finally:
                process.terminate()

    def take_turn(self) -> None:
        self._to.write("\n")
        self._to.flush()
        self.turns.append(self._heard())
        self.peak_bytes = peak_bytes(psutil.Process(self._process.pid))
        self.memory = resident(self._process.pid)

    def _heard(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}: {shlex.join(self.command)}")
        return dict(json.loads(line))

    _process: subprocess.Popen[str] = field(init=False, repr=False)
    _to: IO[str] = field(init=False, repr=False)
    _from: IO[str] = field(init=False, repr=False)


def resident(pid: int) -> dict[str, int]:
    """Bytes of a process by kind; empty where the system does not tell (Linux does)."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return {}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {kind: 1024 * int(lines[key].split()[0]) for kind, key in MEMORY.items()}


def bytes_read(checkpoint: Checkpoint, profile: Profile) -> int:
    """Bytes of the weights that a token needs: of routed experts the chosen ones, no untied embedding."""
    config = checkpoint.config
    sizes = build_graphs(checkpoint, profile).bytes_by_role()
    if not config.tie_word_embeddings:
        sizes.pop("embedding")
    if isinstance(config, MoeTextConfig):
        sizes["experts"] = sizes["experts"] * config.num_experts_per_tok // config.num_experts
    return sum(sizes.values())


def file_bytes(artifact: Path) -> int:
    return sum(path.stat().st_size for path in artifact.glob("model.onnx*"))


def onnx_peer(name: str, artifact: Path, asked: argparse.Namespace, read: int) -> Peer:
    command = [sys.executable, "-m", "benchmarks.peers.genai", str(artifact), *_lengths(asked)]
    return Peer(name, command, read)


def llama_peers(folder: Path, config: TextConfig, asked: argparse.Namespace) -> Iterator[Peer]:
    from benchmarks.peers.gguf_file import bytes_read, write_gguf

    source = folder / "Q4_0.gguf"
    if not source.exists():
        write_gguf(source, config)
    for form in asked.llama_forms:
        file = folder / f"{form}.gguf"
        if not file.exists():
            quantize = [asked.llama, "-m", "benchmarks.peers.llama_quantize", str(source), str(file), form]
            subprocess.run(quantize, check=True, stdout=sys.stderr)
        command = [asked.llama, "-m", "benchmarks.peers.llama", str(file), *_lengths(asked)]
        yield Peer(f"{LLAMA} {form}", command, bytes_read(file, config))


def openvino_peer(checkpoint: Path, output: Path, asked: argparse.Namespace) -> Peer:
    program = "from qwen_export.cli import main; main()"
    options = ["--profile", "intel-lunar-lake", "--no-verify", "--output", output]
    if not output.exists():
        subprocess.run([asked.openvino, "-c", program, *options, checkpoint], check=True, stdout=sys.stderr)
    sizes = json.loads((output / "manifest.json").read_text())["bytes_by_role"]
    command = [asked.openvino, "-m", "benchmarks.peers.openvino", str(output), *_lengths(asked)]
    return Peer("ours, intel-lunar-lake (OpenVINO)", command, sum(sizes.values()))


def _lengths(asked: argparse.Namespace) -> list[str]:
    return ["--prompt", LENGTH, "--tokens", str(asked.tokens)]


def profiles(names: list[str]) -> Iterator[tuple[str, Profile]]:
    """`cpu`, or `cpu:weights.lm_head=int8` with overrides; a portable profile runs on the CPU in float32."""
    for text in names:
        name, *overrides = text.split(";")
        # Of random weights any codes will do: the nearest take seconds.
        profile = load_profile(name, ["compression=data-free", *overrides])
        if profile.lowering == "portable":
            profile = profile.model_copy(
                update={"provider": "cpu", "activation_dtype": "float32", "accuracy_level": 4}
            )
        yield f"ours, {text}", profile


def prepare(asked: argparse.Namespace, folder: Path) -> list[Peer]:
    """Make what each peer reads and is not there yet. The bandwidth comes first."""
    root = folder / "checkpoint"
    checkpoint = generated_checkpoint(root, GEOMETRIES[asked.size])
    copy_tokenizer(TINY, root)
    if (asked.openvino or asked.builder) and not list(root.glob("*.safetensors")):
        write_checkpoint(root, GEOMETRIES[asked.size])
    peers = [Peer(BANDWIDTH, [sys.executable, "-m", "benchmarks.peers.bandwidth"])]
    for name, profile in profiles(asked.profiles):
        output = folder / name
        if not output.exists():
            export(checkpoint, profile, output, Quiet())
        peers.append(onnx_peer(name, output, asked, bytes_read(checkpoint, profile)))
    if asked.llama:
        peers.extend(llama_peers(folder, checkpoint.config, asked))
    if asked.openvino:
        peers.append(openvino_peer(root, folder / "openvino", asked))
    if asked.builder:
        built = folder / "built"
        if not built.exists():
            build(wrap(root, folder / "wrapped"), built)
        peers.append(onnx_peer("builder, default", built, asked, file_bytes(built)))
    for text in asked.peer:
        name, _, command = text.partition("=")
        peers.append(Peer(name, shlex.split(command)))
    return peers


def ratios(peer: Peer, other: Peer, speed: str) -> list[float]:
    return [ours[speed] / theirs[speed] for ours, theirs in zip(peer.turns, other.turns, strict=True)]


def ceiling_shares(peer: Peer, bandwidth: Peer) -> list[float]:
    """Bytes read a second while decoding, as a share of what the memory can give."""
    assert peer.bytes
    return [
        turn["decode"] * peer.bytes / most["bandwidth"]
        for turn, most in zip(peer.turns, bandwidth.turns, strict=True)
    ]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measure(peers: list[Peer], prompt: int, rounds: int) -> None:
    """Let the peers take turns; the first round warms up and is left out."""
    with ExitStack() as stack:
        for peer in peers:
            stack.enter_context(peer.running(prompt))
        with suppress(KeyboardInterrupt):  # Ctrl-C: what was measured so far is told
            for _ in range(rounds + 1):
                for peer in peers:
                    peer.take_turn()
    whole = min(len(peer.turns) for peer in peers)
    if whole < 2:
        raise SystemExit("no round was finished")
    for peer in peers:
        peer.turns = peer.turns[1:whole]


def report(peers: list[Peer], base: Peer, prompt: int, console: Console) -> dict[str, Any]:
    bandwidth, *models = peers
    speed = statistics.median(turn["bandwidth"] for turn in bandwidth.turns)
    console.print(
        f"prompt of {prompt} tokens, read bandwidth {speed / 1e9:.1f} GB/s; ratios to {base.name}; "
        "median (least to most)"
    )
    table = Table(
        "peer", "MB", "prefill tok/s", "decode tok/s", "prefill ratio", "decode ratio", "of ceiling"
    )
    for column in ("load s", "peak MB", *(f"{kind} MB" for kind in MEMORY)):
        table.add_column(column)
    results: dict[str, Any] = {BANDWIDTH: {"bytes_per_second": speed, "turns": bandwidth.turns}}
    for peer in models:
        medians = {speed: statistics.median(turn[speed] for turn in peer.turns) for speed in SPEEDS}
        relative = {speed: ratios(peer, base, speed) for speed in SPEEDS}
        shares = ceiling_shares(peer, bandwidth) if peer.bytes else None
        table.add_row(
            peer.name,
            f"{peer.bytes / 1e6:.0f}" if peer.bytes else "",
            *(f"{medians[speed]:.1f}" for speed in SPEEDS),
            *(spread(relative[speed]) for speed in SPEEDS),
            spread(shares) if shares else "",
            f"{peer.facts['load_seconds']:.1f}",
            f"{peer.peak_bytes / 1e6:.0f}",
            *(f"{peer.memory[kind] / 1e6:.0f}" if peer.memory else "" for kind in MEMORY),
        )
        results[peer.name] = {
            "bytes": peer.bytes,
            "facts": peer.facts,
            "peak_bytes": peer.peak_bytes,
            "memory": peer.memory,
            "turns": peer.turns,
            "median": medians,
            "ratio": relative,
            "share_of_ceiling": shares,
        }
    console.print(table)
    return results


def plot(results: dict[str, Any], base: str, path: Path) -> None:
    """Ratios to `base`, a bar each for prefill and decode, with the spread of the rounds."""
    import matplotlib.pyplot as plt

    names = [name for name in results if name != BANDWIDTH]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.6 * len(names)), layout="constrained")
    for offset, speed in ((-0.2, "prefill"), (0.2, "decode")):
        found = [results[name]["ratio"][speed] for name in names]
        middle = [statistics.median(values) for values in found]
        below = [value - min(values) for value, values in zip(middle, found, strict=True)]
        above = [max(values) - value for value, values in zip(middle, found, strict=True)]
        places = [place + offset for place in range(len(names))]
        axes.barh(places, middle, 0.38, xerr=[below, above], label=speed)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"speed, {base} = 1")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=GEOMETRIES, default="0.8B")
    portable = "strix-halo;provider=dml;lowering=portable;fallbacks=[]"
    parser.add_argument(
        "--profiles", nargs="+", default=["cpu", "cpu-int4", portable], help="name[;override;...]"
    )
    parser.add_argument("--llama", help="a Python with llama-cpp-python")
    parser.add_argument("--llama-forms", nargs="+", default=["Q4_0"], metavar="FORM", help="Q4_K_M, Q2_K ...")
    parser.add_argument("--openvino", help="a Python with the extras export and openvino")
    parser.add_argument("--builder", action="store_true", help="GenAI's model builder, its default int4")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=COMMAND", help=f"{LENGTH} in it is the length"
    )
    parser.add_argument(
        "--prompt", nargs="+", type=int, default=[PROMPT], metavar="N", help="tokens; a table for each length"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each round")
    parser.add_argument(
        "--folder", type=Path, help="keep checkpoint and artifacts there, and take those that are there"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="of the first length")
    asked = parser.parse_args()
    with ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = prepare(asked, folder)
        base = next((peer for peer in peers if peer.name.startswith(LLAMA)), peers[1])
        results = {}
        for prompt in asked.prompt:
            measure(peers, prompt, asked.rounds)
            results[prompt] = report(peers, base, prompt, Console(width=150))
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")
    if asked.plot:
        plot(results[asked.prompt[0]], base.name, asked.plot)


if __name__ == "__main__":
    main()
