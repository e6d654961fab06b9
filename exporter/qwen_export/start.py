"""Where the command `qwen-export` begins: the base install has it too, but not what it needs."""

from __future__ import annotations

import sys

from qwen_common.errors import USER_ERROR


def main() -> None:
    try:
        from qwen_export.cli import main as run
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install 'qwen-edge[export]'", file=sys.stderr)
        sys.exit(USER_ERROR)
    run()
