"""Every setting, declared once. Flags, the keys of `--config` files and checks derive from here.

Both configs are frozen and resolved once: what a default of None means is decided where the
checkpoint and the device are known (serving/assemble.py), and never changed after.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from decimal import Decimal
from typing import Any

from .errors import InvalidConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: int | None = None,
    high: int | None = None,
    is_size: bool = False,
) -> Any:
    """A config field that is also a flag: `max_num_seqs` becomes `--max-num-seqs`.

    Args:
      default: its value when the user says nothing.
      help: what the user reads.
      choices: all values it may have.
      low, high: bounds of a number.
      is_size: bytes, also given as text such as "512MiB".
    """
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "low": low, "high": high, "is_size": is_size},
    )


def parse_bytes(text: str) -> int:
    """Reads a size such as "512MiB", "6GB" or "1073741824" into bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if not match or match[2].upper() not in _UNITS:
        raise InvalidConfig(f"size: got {text!r}, must be like 512MiB, 6GB or a number of bytes")
    return int(Decimal(match[1]) * _UNITS[match[2].upper()])


_KINDS: dict[str, tuple[type, str]] = {
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
    "tuple[str, ...]": (tuple, "a list of names"),
}


def _check(config: Any) -> None:
    """Holds every field against its type and what it was declared with."""
    for f in fields(config):
        value, says = getattr(config, f.name), f.metadata
        if says["is_size"] and isinstance(value, str):
            try:
                value = parse_bytes(value)
            except InvalidConfig as error:
                raise InvalidConfig(f"{f.name}: {error}") from error
        elif isinstance(value, list):
            value = tuple(value)
        object.__setattr__(config, f.name, value)
        problem = _problem(f, value)
        if problem:
            raise InvalidConfig(f"{f.name}: got {value!r}, must be {problem}")


def _problem(declared: Field, value: Any) -> str | None:
    """What a value must be and is not."""
    kind, _, optional = str(declared.type).partition(" | ")
    if optional and value is None:
        return None
    wanted, name = _KINDS[kind]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        return name
    if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
        return name
    choices, low, high = (declared.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in choices:
        return f"one of {', '.join(choices)}"
    if low is not None and value < low:
        return f"at least {low}"
    if high is not None and value > high:
        return f"at most {high}"
    return None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. None means: chosen from the checkpoint and the device at start."""

    model: str = setting("", "checkpoint folder, hub name like org/name, or `demo`")
    revision: str | None = setting(
        None, "branch, tag or commit of a model on the hub (default: main)"
    )
    offline: bool = setting(False, "take models of the hub from the cache alone")
    platform: str = setting(
        "auto",
        "what to run on; auto is the accelerator there is, and the CPU only where there is none",
        choices=("auto", "cpu", "gpu", "tpu"),
    )
    dtype: str = setting(
        "auto",
        "type of weights, activations and KV; auto is the checkpoint's on an accelerator and "
        "float32 on CPU",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    dummy_weights: bool = setting(
        False,
        "random weights made on the device, for measuring: MODEL needs a config.json alone, and "
        "answers mean nothing",
    )
    max_model_len: int | None = setting(
        None, "longest prompt plus output in tokens (default: what the checkpoint allows)", low=2
    )
    lift_context_limit: bool = setting(
        False,
        "let max-model-len go beyond the context that the checkpoint was made for; what it answers "
        "there may mean nothing",
    )
    max_num_seqs: int | None = setting(
        None,
        "requests that run at once (default: 1024 on accelerators with 24 GiB or more beside the "
        "weights, 256 on others, 16 on CPU)",
        low=1,
    )
    max_batched_tokens: int | None = setting(
        None, "tokens in one step at most (default: 2048 on accelerators, 256 on CPU)", low=2
    )
    prefill_chunk: int | None = setting(
        None, "tokens of one prompt in one step at most (default: max-batched-tokens)", low=1
    )
    page_size: int | None = setting(
        None,
        "token positions in a KV page, a power of two (default: 16 on GPUs, 32 on TPUs and CPU)",
        low=1,
        high=1024,
    )
    memory: int | None = setting(
        None,
        "bytes of each device for everything, like 6GiB: weights, KV pages, state, programs "
        "(default: 90 % of a GPU's, 95 % of a TPU's; on CPU the weights and half of what they "
        "leave)",
        low=1,
        is_size=True,
    )
    kv_memory: int | None = setting(
        None,
        "bytes of that for KV pages, like 512MiB (default: what every slot needs at full length, "
        "at most what is left)",
        low=1,
        is_size=True,
    )
    tensor_parallel: int = setting(
        1, "devices of this machine that the model is cut over", low=1, high=256
    )
    prefix_caching: bool = setting(True, "share the KV of equal prompt prefixes")
    overlap: bool = setting(True, "launch a step while the results of the last are collected")
    decode_steps: int = setting(
        1,
        "tokens each answer may gain in one dispatch while no prompt waits; saves host time, but a "
        "prompt that arrives waits until the dispatch ends: keep this times the time of a decode "
        "step under 15 ms",
        low=1,
        high=16,
    )
    max_queue: int = setting(1024, "requests that may wait before more are refused", low=1)
    warmup: bool = setting(
        True, "compile every step program before ready; off compiles each at its first use"
    )
    compile_threads: int | None = setting(
        None,
        "step programs compiled at once (default: cores, at most 16, what a quarter of the "
        "host's memory holds, and on a GPU what fits beside the weights)",
        low=1,
    )
    cache_dir: str | None = setting(
        None, "folder for compiled programs (default: ~/.cache/quire; an empty string for none)"
    )
    cache_limit: int = setting(
        "4GiB",
        "bytes that folder may grow to; what was used least recently goes first",
        low=2**24,
        high=2**44,
        is_size=True,
    )
    ignore_config_fields: tuple[str, ...] = setting(
        (), "fields of config.json to ignore although Quire does not know them (comma-separated)"
    )

    def __post_init__(self) -> None:
        _check(self)
        if self.page_size and self.page_size & (self.page_size - 1):
            raise InvalidConfig(f"page_size: got {self.page_size}, must be a power of two")
        if self.lift_context_limit and self.max_model_len is None:
            raise InvalidConfig("lift_context_limit: needs max_model_len, got none")
        if self.prefill_chunk and self.prefill_chunk > (self.max_batched_tokens or 2**31):
            raise InvalidConfig(
                f"prefill_chunk: got {self.prefill_chunk}, must be at most max_batched_tokens "
                f"({self.max_batched_tokens})"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the gRPC service."""

    host: str = setting("127.0.0.1", "address to bind")
    port: int = setting(50051, "port to bind; 0 takes a free one and says which", low=0, high=65535)
    frontends: int = setting(
        1,
        "processes that answer callers; each is good for some 25,000 tokens a second",
        low=1,
        high=64,
    )
    api_keys: str | None = setting(
        None,
        "file of API keys that callers must have, and of what their tenants may ask for; see "
        "`quire keys` (default: whoever reaches the port is served)",
    )
    insecure: bool = setting(
        False, "serve other machines although there are neither API keys nor client certificates"
    )
    tls_cert: str | None = setting(
        None, "PEM file of the server's certificate chain; read again when it changes"
    )
    tls_key: str | None = setting(None, "PEM file of its private key, without a password")
    tls_client_ca: str | None = setting(
        None, "PEM file of certificates that callers' must be signed by (mutual TLS)"
    )
    compression: str = setting(
        "none",
        "of responses, for callers that take it; requests may be compressed in any case",
        choices=("none", "gzip"),
    )
    max_message_size: int = setting(
        "16MiB",
        "bytes that a request may have; a prompt of a million tokens takes 4 MB",
        low=2**16,
        high=2**30,
        is_size=True,
    )
    max_calls: int = setting(
        4096,
        "calls that a frontend has at once, waiting ones included, before more are refused",
        low=1,
        high=2**20,
    )
    keepalive: int = setting(
        60,
        "seconds after which a connection on which nothing was said is looked at; callers that do "
        "not answer within 20 s are gone",
        low=1,
        high=86_400,
    )
    drain_timeout: int = setting(30, "seconds running requests get to end on SIGTERM", low=0)
    step_timeout: int = setting(
        120,
        "seconds after which a device step counts as hung and the engine process is started again; "
        "with --no-warmup a step may also compile",
        low=1,
    )
    metrics_port: int | None = setting(
        None,
        "port to serve Prometheus metrics on; 0 takes a free one and says which (default: none)",
        low=0,
        high=65535,
    )
    metrics_host: str = setting("127.0.0.1", "address to bind for metrics")
    log_format: str = setting(
        "text",
        "form of the log on stderr: lines, or a JSON object a line",
        choices=("text", "json"),
    )
    log_level: str = setting(
        "info",
        "least severe messages to log; info has a line for each request",
        choices=("debug", "info", "warning", "error"),
    )
    log_prompts: bool = setting(False, "log what is asked and answered, too")
    otlp_endpoint: str | None = setting(
        None,
        "where to send traces by OTLP over gRPC, like http://localhost:4317 (needs quire[otel])",
    )

    def __post_init__(self) -> None:
        _check(self)
        for name in ("host", "metrics_host"):
            if not getattr(self, name):
                raise InvalidConfig(f"{name}: got '', must be a name or an address")
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise InvalidConfig(f"{missing}: got none, must be given together with {given}")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InvalidConfig("tls_client_ca: works with tls_cert and tls_key alone, got none")
        knows_callers = self.api_keys is not None or self.tls_client_ca is not None
        if not (knows_callers or self.insecure or is_loopback(self.host)):
            raise InvalidConfig(
                f"host: got {self.host!r}, which other machines reach, so it needs api_keys or "
                f"tls_client_ca; `insecure` serves whoever comes"
            )
        endpoint = self.otlp_endpoint
        if endpoint is not None and not re.fullmatch(r"https?://[^/\s]+/?", endpoint):
            raise InvalidConfig(
                f"otlp_endpoint: got {endpoint!r}, must be like http://localhost:4317"
            )

    @property
    def shows_keys(self) -> bool:
        """Whether callers on other machines send their API keys where others can read them."""
        return self.api_keys is not None and self.tls_cert is None and not is_loopback(self.host)


def settings_of(config: type) -> list[Field]:
    """The settings a config class declares, in order."""
    return list(fields(config))


def check_names(config: type, given: Iterable[str]) -> None:
    """Raises InvalidConfig for a setting that a config class does not declare."""
    names = [declared.name for declared in settings_of(config)]
    for name in given:
        if name not in names:
            raise InvalidConfig(f"{name}: no such setting, must be one of {', '.join(names)}")
