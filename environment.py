"""What the environment says: of the hub, of devices to hide, of compilers, of where caches are.

Read here and nowhere else, each time it is asked for; settings are flags (config.py).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """Where models of the hub come from and go to, as huggingface_hub reads it too.

    Attributes:
      endpoint: HF_ENDPOINT, without a slash at its end.
      token: HF_TOKEN; None leaves it to huggingface_hub, which knows what `hf auth login` stored.
      cache: HF_HUB_CACHE, or HF_HOME/hub.
      offline: HF_HUB_OFFLINE.
    """

    endpoint: str = field(repr=False)
    token: str | None = field(repr=False)
    cache: Path
    offline: bool

    @property
    def shown_endpoint(self) -> str:
        """The endpoint as messages show it."""
        return without_secrets(self.endpoint)


def without_secrets(text: str) -> str:
    """Text in which the user and password of each URL are masked."""
    return re.sub(r"(?<=://)[^/\s'\"]+@", "***@", text)


def hub_settings() -> HubSettings:
    """The hub's settings, from the environment as it is now."""
    env = os.environ.get
    home = env("HF_HOME") or os.path.join(
        env("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface"
    )
    cache = env("HF_HUB_CACHE") or os.path.join(home, "hub")
    return HubSettings(
        endpoint=(env("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
        token=(env("HF_TOKEN") or "").strip() or None,
        cache=Path(os.path.expandvars(cache)).expanduser(),
        offline=(env("HF_HUB_OFFLINE") or "").upper() in ("1", "ON", "YES", "TRUE"),
    )


def accelerators_hidden() -> str | None:
    """What in the environment keeps JAX from accelerators, spelled as it was set; None if nothing.

    Who set it asked for the CPU.
    """
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        value = os.environ.get(name, "")
        if value.split(",")[0].strip() == "cpu":
            return f"{name}={value}"
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        hidden = os.environ.get(name)
        if hidden is not None and hidden.strip() in ("", "-1", "none", "void"):
            return f"{name}={hidden}"
    return None


_COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TF_XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")


def compiler_environment() -> dict[str, str]:
    """The variables that change what XLA makes of a program."""
    return {name: os.environ[name] for name in _COMPILER_VARIABLES if name in os.environ}


def child_environment() -> dict[str, str]:
    """The environment of a server's child processes: this one's, and what the user did not set.

    grpc's C core says nothing: its lines have no form, and each stranger's connection that fails
    would write one. The C library allots from an arena for each core, instead of eight: memory that
    lives long lies scattered over them, and each keeps what is free around it (docs/benchmarks.md).
    """
    ours = {"GRPC_VERBOSITY": "NONE", "MALLOC_ARENA_MAX": str(os.cpu_count() or 1)}
    return {**ours, **os.environ}


_POOL_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def pool_share() -> tuple[str, float] | None:
    """The share of a GPU that the user told JAX itself to take, and the variable that says so."""
    for name in _POOL_VARIABLES:
        if text := os.environ.get(name):
            try:
                return name, float(text)
            except ValueError:
                raise InvalidConfig(f"{name}: got {text!r}, must be a share of 1") from None
    return None


def default_cache_dir() -> Path:
    """Where compiled programs go when the user names no folder (XDG base directories)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quire"
