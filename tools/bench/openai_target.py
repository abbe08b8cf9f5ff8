"""Servers of OpenAI's completions as targets of a load, so that other engines can be measured too.

Used by serve.py. Needs httpx, of the extra `bench`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import httpx

from ...config import is_loopback
from ...errors import QuireError, Unavailable
from .targets import Told


class OpenAITarget:
    """`POST /v1/completions` as vLLM, SGLang and others serve it, with their `ignore_eos`.

    Args:
      address: the part of the URL before /v1, or with it.
      model: as the server names it; None asks the server.

    Attributes:
      base: the part of the URL before /v1.
    """

    def __init__(self, address: str, *, api_key: str | None, model: str | None):
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        base = (
            (address if "://" in address else f"http://{address}").rstrip("/").removesuffix("/v1")
        )
        if api_key is not None and _shows_keys(httpx.URL(base)):
            warnings.warn(f"the API key goes to {base} in plain text; use https", stacklevel=2)
        self.base = base
        self._http = httpx.AsyncClient(
            base_url=base, headers=headers, limits=limits, timeout=None, trust_env=False
        )
        self._model = model

    async def __aenter__(self) -> OpenAITarget:
        if self._model is None:
            try:
                answer = await self._http.get("/v1/models", timeout=20)
                self._model = answer.raise_for_status().json()["data"][0]["id"]
            except (httpx.HTTPError, ValueError, LookupError) as error:
                await self._http.aclose()
                raise Unavailable(f"address: no model's name at /v1/models: {error!r}") from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def described(self) -> dict[str, Any]:
        return {"model": self._model}

    async def stream(
        self, prompt: Sequence[int], output: int, told: Told = lambda hit, first: None
    ) -> AsyncIterator[int]:
        asked = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": output,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            # Says how many tokens have come, where a server knows it; else each message is one.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        count = 0
        try:
            async with self._http.stream("POST", "/v1/completions", json=asked) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise QuireError(f"status {response.status_code}: {text[:500]}")
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    message = json.loads(line.removeprefix("data:"))
                    now = tokens_so_far(message, count, output)
                    if (hit := _cached_tokens(message)) is not None:
                        told(hit, None)
                    if now != count:
                        count = now
                        yield count
        except (httpx.HTTPError, ValueError) as error:
            raise QuireError(f"{type(error).__name__}: {error}") from error


def _cached_tokens(message: dict[str, Any]) -> int | None:
    """Of the prompt, where the message says it."""
    details = (message.get("usage") or {}).get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if isinstance(cached, int) else None


def _shows_keys(url: httpx.URL) -> bool:
    return url.scheme != "https" and not is_loopback(url.host)


def tokens_so_far(message: Any, before: int, output: int) -> int:
    """How many of `output` tokens have come with this message, when `before` had come.

    Servers differ: some say it with each message; some at the end alone, or never, and then a
    message with text is a token. Many end with a message without text, which is none. Who ends for
    length has sent them all, also those that were no text by themselves.
    """
    if not isinstance(message, dict):
        raise QuireError(f"got {message!r:.200}, must be a JSON object")
    if message.get("error"):
        raise QuireError(str(message["error"]))
    usage = message.get("usage")
    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
        return int(usage["completion_tokens"])
    choices = [choice for choice in message.get("choices") or () if isinstance(choice, dict)]
    if any(choice.get("finish_reason") == "length" for choice in choices):
        return output
    return before + any(bool(choice.get("text")) for choice in choices)
