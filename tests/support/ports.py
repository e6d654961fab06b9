"""Ports for servers that are told theirs when they start."""

from __future__ import annotations

import random
import socket

# Below those that systems give to connections and to whoever asks for any: nobody is given it meanwhile.
_PORTS = range(10_000, 30_000)


def free_port() -> int:
    """One that nobody listens on."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
