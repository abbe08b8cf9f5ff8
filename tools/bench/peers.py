"""Another engine's figures and our targets, by names that both have. Used by compare.py.

data/peers_h200.json is as it was handed to us, methods included; data/targets_h200.json says which
of its sections a model of ours is held against, and what we aim at. A figure's name is the path to
it: "decode_step_ms/64", "online/25/ttft_ms_p99".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .models import DATA


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure is to be. None: nobody said.

    Attributes:
      target, stretch: aimed at, and hoped for.
      limit: what the hardware allows.
    """

    target: float | None = None
    stretch: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Peers:
    """What one model of ours is compared with.

    Attributes:
      section: of peers_h200.json.
      figures: the peers', by name.
      goals: ours, by name.
      online_requests: how many requests the peers were sent, by rate.
    """

    section: str
    figures: dict[str, float]
    goals: dict[str, Goal]
    online_requests: dict[str, int]


class PeerData:
    """Both files.

    Attributes:
      device: its kind, as JAX calls it.
      engine, hardware: whose figures these are, and on what.
    """

    def __init__(self) -> None:
        self._peers: dict[str, Any] = json.loads((DATA / "peers_h200.json").read_text())
        targets = json.loads((DATA / "targets_h200.json").read_text())
        self.device: str = targets["device"]
        self.engine: str = self._peers["engine"].partition(",")[0]
        self.hardware: str = self._peers["hardware"].partition(",")[0]
        self._models: dict[str, Any] = targets["models"]

    @property
    def models(self) -> list[str]:
        """Models of ours, with the dtypes that the peers were measured in."""
        return [f"{name} in {dtype}" for name, by in self._models.items() for dtype in by]

    def of(self, model: str, dtype: str) -> Peers | None:
        """By the last part of a model's name or folder; None: they have no such model.

        Args:
          dtype: of the weights; "auto" is what the model's checkpoint has.
        """
        dtypes = self._models.get(model.rstrip("/").rpartition("/")[2].lower())
        if dtypes is None:
            return None
        found = dtypes.get(next(iter(dtypes)) if dtype == "auto" else dtype)
        if found is None:
            return None
        section = self._peers[found["peer"]]
        return Peers(
            section=found["peer"],
            figures=_flat(section),
            goals={name: Goal(**goal) for name, goal in found["figures"].items()},
            online_requests={
                f"{run['rate_req_s']:g}": run["requests"] for run in section.get("online", ())
            },
        )


def _flat(section: dict[str, Any]) -> dict[str, float]:
    """The figures of a section by path; percentiles beside each other get names of their own."""
    flat: dict[str, float] = {}
    for name, group in section.items():
        if name != "online":
            flat |= {f"{name}/{key}": float(value) for key, value in group.items()}
    for run in section.get("online", ()):
        place = f"online/{run['rate_req_s']:g}"
        flat[f"{place}/output_tok_s"] = float(run["output_tok_s"])
        for name, values in run.items():
            if isinstance(values, list):
                kind, *percentiles = name.replace("_ms_", "_ms ").replace("_p", " p").split()
                flat |= {
                    f"{place}/{kind}_{p}": float(v)
                    for p, v in zip(percentiles, values, strict=True)
                }
    return flat
