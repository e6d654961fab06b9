"""The work of a release on one machine: a group of combinations is exported in step, verified and pushed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_common.errors import UserError, mended_by

from qwen_export.checkpoint.checkpoint import Checkpoint
from qwen_export.export import export_together
from qwen_export.matrix.plan import Planned, checkpoint_of, export_of, open_group
from qwen_export.matrix.target import send
from qwen_export.progress import Progress
from qwen_export.verify.verification import DEFAULT_TOKENS, verify

# Shows how far a part of the work is: the title, and whether bytes are counted.
Shown = Callable[[str, bool], AbstractContextManager[Progress]]


@dataclass
class Outcome:
    """What became of one combination.

    Attributes:
        made: whether it was exported now.
        passed: whether it is above its profile's bar; None: not verified.
        pushed: the commit or digest that it has there.
        error: a line, where something failed.
        mendable: whether that is the user's to mend.
    """

    planned: Planned
    made: bool = False
    passed: bool | None = None
    pushed: str | None = None
    error: str | None = None
    mendable: bool = True

    @property
    def state(self) -> str:
        if self.error is not None:
            return "failed"
        return "made" if self.made else "unchanged"

    def fail(self, error: Exception) -> None:
        line = mended_by(error) if isinstance(error, OSError) else None
        self.mendable = isinstance(error, UserError) or line is not None
        self.error = line or (str(error) if self.mendable else f"{type(error).__name__}: {error}")

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What is raised in it is the error."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def as_json(self) -> dict[str, Any]:
        done = {"state": self.state, "passed": self.passed, "pushed": self.pushed, "error": self.error}
        return self.planned.as_json() | done


def run(group: Sequence[Planned], shown: Shown) -> list[Outcome]:
    """Export what has changed in `group`, each tensor read once; then verify and push each of them.

    One that fails does not stop the others. The next run goes on with what an interrupted one leaves.
    """
    outcomes = [Outcome(planned, passed=planned.todo.passed) for planned in group]
    working = [outcome for outcome in outcomes if outcome.planned.needs_work]
    if working:
        try:
            opened = open_group([outcome.planned.combination for outcome in working])
        except Exception as error:
            for outcome in working:
                outcome.fail(error)
        else:
            _work(working, opened, shown)
    for outcome in outcomes:
        one = outcome.planned.combination
        if one.push and outcome.error is None and outcome.passed is not False:
            with outcome.failing(), shown(f"push {one.label}", False) as progress:
                outcome.pushed = send(one.output, one.push, one.public, one.plain_http, progress.note)
    return outcomes


def _work(working: Sequence[Outcome], opened: Checkpoint, shown: Shown) -> None:
    if opened.streamed:
        opened.streamed.needed_again = any(outcome.planned.todo.verify for outcome in working)
    checkpoints: list[tuple[Outcome, Checkpoint]] = []
    for outcome in working:
        with outcome.failing():
            checkpoints.append((outcome, checkpoint_of(outcome.planned.combination, opened)))
    _export([(outcome, found) for outcome, found in checkpoints if outcome.planned.todo.reasons], shown)
    for outcome, checkpoint in checkpoints:
        if outcome.planned.todo.verify and outcome.error is None:
            with outcome.failing():
                outcome.passed = _passes(outcome.planned, checkpoint, shown)
    if opened.streamed:
        opened.streamed.finish()


def _export(found: Sequence[tuple[Outcome, Checkpoint]], shown: Shown) -> None:
    if not found:
        return
    exports = [export_of(outcome.planned.combination, checkpoint) for outcome, checkpoint in found]
    labels = [outcome.planned.combination.label for outcome, _ in found]
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    with shown(f"export {labels[0]}{more}", True) as progress:
        for index, made in export_together(exports, progress):
            outcome = found[index][0]
            if isinstance(made, Exception):
                outcome.fail(made)
            else:
                outcome.made = True


def _passes(planned: Planned, checkpoint: Checkpoint, shown: Shown) -> bool:
    one = planned.combination
    with shown(f"verify {one.label}", False) as progress:
        report = verify(
            one.output,
            checkpoint,
            progress,
            provider=one.checks.provider,
            tokens=one.checks.tokens or DEFAULT_TOKENS,
            text=Path(one.checks.text) if one.checks.text else None,
        )
    return bool(report["passed"])
