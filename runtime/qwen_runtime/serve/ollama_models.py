"""`/api/tags`, `/api/show`, `/api/ps`, `/api/version`: what Ollama's clients ask of the models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from qwen_common.manifest import MANIFEST
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_runtime.artifact import Artifact
from qwen_runtime.pooling import has_hidden_states
from qwen_runtime.serve.common import served_for
from qwen_runtime.serve.http import read_json
from qwen_runtime.serve.schema.base import parse
from qwen_runtime.serve.schema.ollama import ShowRequest
from qwen_runtime.serve.served import Served
from qwen_runtime.template import begins_thought

# Of Ollama's API as it is spoken here. Editors refuse servers that are older than what they need.
API_VERSION = "0.12.11"


async def tags(http: HttpRequest) -> Response:
    return JSONResponse({"models": [_entry(served) for served in http.app.state.models.served.values()]})


async def ps(http: HttpRequest) -> Response:
    served = served_for(http, None)
    if served.engine.asleep:
        return JSONResponse({"models": []})
    info = served.info
    entry = _entry(served)
    running = {
        **entry,
        "expires_at": "9999-12-31T23:59:59Z",
        "size_vram": 0 if info.provider == "cpu" else entry["size"],
        "context_length": info.context_length,
    }
    return JSONResponse({"models": [running]})


async def show(http: HttpRequest) -> Response:
    asked = parse(ShowRequest, await read_json(http, undeclared=True))
    served = served_for(http, asked.model or asked.name)
    info = served.info
    artifact = Artifact.open(info.path)
    templates = info.templates
    family = artifact.manifest["model"]["model_type"]
    decoder = artifact.genai_config["model"].get("decoder", {})
    shape = {"embedding_length": "hidden_size", "block_count": "num_hidden_layers"}
    capabilities = [
        "completion",
        *(["tools"] if info.dialect and any("tools" in template for template in templates.values()) else []),
        *(["thinking"] if _thinks(templates) else []),
        *(["vision"] if info.images else []),
        *(["embedding"] if has_hidden_states(artifact) else []),
    ]
    return JSONResponse(
        {
            "modelfile": f"FROM {served.parent or info.name}",
            "parameters": "",
            "template": next(iter(templates.values()), ""),
            "details": _details(artifact, served),
            "model_info": {
                "general.architecture": family,
                "general.basename": info.name,
                f"{family}.context_length": info.context_length,
                **{f"{family}.{name}": decoder[key] for name, key in shape.items() if key in decoder},
            },
            "capabilities": capabilities,
            "modified_at": _modified(artifact),
        }
    )


async def version(http: HttpRequest) -> Response:
    return JSONResponse({"version": API_VERSION})


def _thinks(templates: Mapping[str, str]) -> bool:
    """Whether the model can be asked to think, or does so in any case."""
    asked = any("enable_thinking" in template for template in templates.values())
    return asked or begins_thought(templates, [{"role": "user", "content": "A"}])


def _entry(served: Served) -> dict[str, Any]:
    artifact = Artifact.open(served.info.path)
    made_of = (artifact.root / MANIFEST).read_bytes() + (served.adapter or "").encode()
    return {
        "name": served.name,
        "model": served.name,
        "modified_at": _modified(artifact),
        "size": sum(entry["size"] for entry in artifact.manifest["files"].values()),
        "digest": hashlib.sha256(made_of).hexdigest(),
        "details": _details(artifact, served),
    }


def _details(artifact: Artifact, served: Served) -> dict[str, Any]:
    """The manifest does not say how many parameters there are."""
    family = artifact.manifest["model"]["model_type"]
    return {
        "parent_model": served.parent or "",
        "format": artifact.backend.value,
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": artifact.manifest["profile"],
    }


def _modified(artifact: Artifact) -> str:
    seconds = (artifact.root / MANIFEST).stat().st_mtime
    return datetime.fromtimestamp(seconds, UTC).isoformat()
