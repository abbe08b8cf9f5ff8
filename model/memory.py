"""Where every byte of a device goes, known before anything is loaded. Pure.

Made by model/sizing.py; shown at the start of an engine and by `quire inspect`, and compared with
the device's own statistics (model/devices.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

MIB, GIB = 2**20, 2**30

CAPACITY_GRAIN = 256 * MIB
"""A device's memory is rounded down to this: drivers differ by a few MiB from boot to boot, and
stored programs must not."""

STEPS_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Platform:
    """How a platform's memory is divided.

    Attributes:
      share: of the device, that an engine takes unless told otherwise.
      outside: bytes beside JAX's pool: the driver's context, code, CUDA graphs.
      inside: bytes of the pool that are lost between arrays, or taken by programs' code.
      rounding: of those, what the pool's own statistics count as in use. XLA's allocator for GPUs
        leaves up to 128 MiB beside an array uncut and counts them as the array's: on an H200, the
        last of a pool of 5.6 GB whole, of one of 134 GB a quarter. This is the middle.
      page_size: token positions in a KV page, unless told otherwise. Half of a request's last page
        is empty: at 16 that is 2 % of what chats hold, at 32 4 %. On TPUs K and V are written 16
        tokens at once where those lie in one page, and JAX's attention keeps page tables in scalar
        memory: both ask for larger pages.
    """

    share: float
    outside: int
    inside: int
    rounding: int
    page_size: int


PLATFORMS = {
    "cpu": Platform(1.0, 0, 0, 0, 32),  # of arrays; the process around them is not counted
    "gpu": Platform(0.9, 768 * MIB, 128 * MIB, 64 * MIB, 16),
    "tpu": Platform(
        0.95, 0, 512 * MIB, 0, 32
    ),  # the runtime's own is not in what a TPU says it has
}


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """The memory of one device, in bytes.

    Attributes:
      capacity: what the device has, rounded down.
      budget: what this engine may take of it, for everything.
      weights: parameters.
      kv: pages of keys and values, all layers.
      slots: state of running requests, page tables included.
      controls: penalties, biases and bad words of running requests.
      temp: working memory of the program that needs most; 0 while not known.
      staging: inputs and results of the steps in flight, and what a step's programs hand over.
      reserve: driver, code, CUDA graphs, what is lost between arrays.
      rounding: of the reserve, what is lost and yet counted as in use; see Platform.
      pages, page_size: KV pages (page 0 included, which is never used), and positions in each.
      host_mapped: weights on disk, mapped while loading; the kernel may drop these pages.
      host_staging: host memory that loading takes beside them: twice the largest parameter.
    """

    capacity: int
    budget: int
    weights: int
    kv: int
    slots: int
    controls: int
    temp: int
    staging: int
    reserve: int
    rounding: int
    pages: int
    page_size: int
    host_mapped: int
    host_staging: int

    @property
    def arrays(self) -> int:
        """What lives as long as the engine."""
        return self.weights + self.kv + self.slots + self.controls

    @property
    def pool(self) -> int:
        """What JAX's own statistics see at the peak: all but the reserve, in which they count what
        is lost by rounding."""
        return self.arrays + self.temp + self.staging + self.rounding

    @property
    def total(self) -> int:
        return self.arrays + self.temp + self.staging + self.reserve

    @property
    def tokens(self) -> int:
        """Positions in the pages that can be handed out."""
        return (self.pages - 1) * self.page_size

    def as_dict(self) -> dict[str, int]:
        """All that is bytes, by name, the sums included."""
        table = asdict(self)
        del table["pages"], table["page_size"]
        return {**table, "pool": self.pool, "total": self.total}

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) a line, for people."""
        named = [
            ("weights", self.weights, ""),
            ("KV pages", self.kv, f"{self.pages:,} of {self.page_size}: {self.tokens:,} tokens"),
            ("slots", self.slots, ""),
            ("controls", self.controls, ""),
            ("program temp", self.temp, "of the largest program"),
            ("staging", self.staging, f"{STEPS_IN_FLIGHT} steps in flight"),
            ("reserve", self.reserve, "driver, code, graphs, between arrays"),
        ]
        kept = [row for row in named if row[1]]
        kept.append(("total", self.total, f"of {human_bytes(self.budget)} allowed"))
        kept.append(("device", self.capacity, ""))
        return kept


def human_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def coarse(pages: int) -> int:
    """A page count rounded down by less than 1 %, so that it is the same from start to start."""
    grain = 1 << max(0, pages.bit_length() - 8)
    return pages - pages % grain
