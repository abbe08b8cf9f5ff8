"""Quire: an LLM serving engine in JAX for TPUs and GPUs.

Public names load on first use (PEP 562), so `import quire` and `quire --help` load no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "LLM": "quire.serving.llm",
    "SamplingParams": "quire.sched.sampling_params",
    "BeamSearchParams": "quire.serving.beam",
    "EngineConfig": "quire.config",
    "ServerConfig": "quire.config",
    "Client": "quire.client.blocking",
    "AsyncClient": "quire.client.asynchronous",
    "Completion": "quire.serving.llm",
    "Generation": "quire.serving.llm",
}

__all__ = [
    "LLM",
    "AsyncClient",
    "BeamSearchParams",
    "Client",
    "Completion",
    "EngineConfig",
    "Generation",
    "SamplingParams",
    "ServerConfig",
]

if TYPE_CHECKING:
    from quire.client.asynchronous import AsyncClient
    from quire.client.blocking import Client
    from quire.config import EngineConfig, ServerConfig
    from quire.sched.sampling_params import SamplingParams
    from quire.serving.beam import BeamSearchParams
    from quire.serving.llm import LLM, Completion, Generation


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
