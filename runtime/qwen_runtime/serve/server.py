"""`qwen-run serve`: from an artifact to a listening server, and to its end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import closing

import uvicorn
from qwen_common.errors import UserError

from qwen_runtime.loopback import is_loopback
from qwen_runtime.serve.access import access
from qwen_runtime.serve.app import make_app
from qwen_runtime.serve.connection import Connection
from qwen_runtime.serve.engine import Engine
from qwen_runtime.serve.http import SEND_TIMEOUT
from qwen_runtime.serve.metrics import Metrics
from qwen_runtime.serve.models import Models
from qwen_runtime.serve.while_loading import answering
from qwen_runtime.serve.worker import ModelSettings

_KEEP_ALIVE = 30  # seconds that an idle connection stays open
_CONNECTIONS = 256


def serve(
    settings: Sequence[ModelSettings],
    *,
    host: str,
    port: int,
    api_key: str | None,
    allowed_hosts: Sequence[str],
    cors_origins: Sequence[str],
    parallel: int,
    queue: int,
    thinking: bool,
    strict_model: bool,
    grace: int,
    kiosk: bool,
    unload_after: float | None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, which let running answers finish for `grace` seconds.

    Args:
        port: 0 takes any that is free.
        allowed_hosts: names beside its own that it answers to.
        cors_origins: of other sites' pages that may use it.
        parallel: most answers that are made at the same time.
        settings: of each model. The first is loaded at once.
        queue: most requests that wait for their turn, of each model.
        unload_after: seconds without a request after which a model leaves memory.

    Raises:
        UserError: the artifact cannot be loaded, the address is taken, or it needs an API key.
    """
    local = is_loopback(host)
    name = f"[{host}]" if ":" in host else host
    if not local and not api_key:
        raise UserError(f"{host} can be reached from other machines: give an --api-key")
    allowed = access(name, local=local, allowed_hosts=allowed_hosts, origins=cors_origins, api_key=api_key)
    metrics = Metrics()
    engines = [Engine(each, parallel, queue, metrics) for each in settings]
    with _listen(host, port) as listener, closing(Models(engines, unload_after)) as models:
        # Until uvicorn listens to signals, and when it has shut down, for it raises them again then.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        # It warns of every write to a client that has just left.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        with answering(listener, settings[0].path, engines[0].info.name):
            engines[0].load()
        print(engines[0].info.placed, flush=True)
        print(f"listening on http://{name}:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(
            make_app(
                models,
                access=allowed,
                api_key=api_key,
                thinking=thinking,
                strict_model=strict_model,
                kiosk=kiosk,
            ),
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            http=Connection,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=grace,
            limit_concurrency=_CONNECTIONS,
            ws="none",
        )
        logging.getLogger("uvicorn.error").addFilter(_is_no_end)
        uvicorn.Server(config).run(sockets=[listener])


def _is_no_end(record: logging.LogRecord) -> bool:
    """uvicorn shows a traceback for each answer, and for the application, that it cancels when it is told to
    end, at the second Ctrl-C and when the grace is over."""
    cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cancelled and not record.getMessage().rstrip().endswith(asyncio.CancelledError.__name__)


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that a port that is taken is known at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another with --port or --host"
        ) from error
    if sys.platform == "linux":
        # A connection is closed only when all was sent. Its reader may never take it, and this ends that.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SEND_TIMEOUT))
    return listener
