"""API keys: how they look, and what is kept of them.

    quire-<id>-<secret>      the secret is 256 random bits

A file keeps the id, a salt and SHA-256 of salt and key. A slow hash such as scrypt protects secrets
that people choose, because those can be guessed; 256 random bits cannot be, at any speed. And every
call is checked on the event loop: microseconds of SHA-256 are right there, and 50 ms of scrypt
would let anybody who sends wrong keys stop the server.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

_SHAPE = re.compile(r"quire-([0-9a-f]{8})-[A-Za-z0-9_-]{43}")
_SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class KeyHash:
    """What is kept of a key's text; as text `sha256:SALT:DIGEST`, both in hexadecimal."""

    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, key: str) -> KeyHash:
        salt = secrets.token_bytes(_SALT_BYTES)
        return cls(salt, _digest(salt, key))

    @classmethod
    def parse(cls, text: str) -> KeyHash:
        """Raises ValueError if it is not one."""
        kind, salt, digest = text.split(":")
        made = cls(bytes.fromhex(salt), bytes.fromhex(digest))
        if kind != "sha256" or len(made.salt) < 8 or len(made.digest) != 32:
            raise ValueError(text)
        return made

    def __str__(self) -> str:
        return f"sha256:{self.salt.hex()}:{self.digest.hex()}"

    def matches(self, key: str) -> bool:
        """Takes as long for a wrong key as for the right one."""
        return hmac.compare_digest(_digest(self.salt, key), self.digest)


def draw_key() -> tuple[str, str]:
    """A new key: its id and its text."""
    id = secrets.token_hex(4)
    return id, f"quire-{id}-{secrets.token_urlsafe(32)}"


def id_of(key: str) -> str | None:
    """The id in a key; None if it does not look like one."""
    found = _SHAPE.fullmatch(key)
    return found[1] if found else None


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode()).digest()


NOBODY = KeyHash.of(secrets.token_urlsafe(32))
"""Matches nothing: what a key with an unknown id is compared with, which takes as long."""
