"""Ragged paged attention: the contract in api.py, one file per backend."""

from .api import ragged_paged_attention

__all__ = ["ragged_paged_attention"]
