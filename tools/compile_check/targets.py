"""The devices that programs are compiled for without being there."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec

from ...model.compile import described_devices
from ...model.mesh import Mesh

_PLUGINS = {"gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}


def why_not(platform: str) -> str | None:
    """Why nothing can be compiled for "gpu" or "tpu" here, None where it can."""
    if any(find_spec(name) for name in _PLUGINS[platform]):
        return None
    return (
        f"no compiler for {platform} here: none of {', '.join(_PLUGINS[platform])} is installed; "
        "pip install 'quire[compile-check]' brings it"
    )


def gpu_mesh(name: str = "h200", devices: int = 1) -> Mesh:
    """A mesh of GPUs described by targets/NAME.txtpb, XLA's own text of what a device can do.

    Raises:
      FileNotFoundError: no such description is shipped.
    """
    description = files(__package__).joinpath("targets", f"{name}.txtpb").read_text()
    topology = f"1x1x{devices}"
    return Mesh(described_devices("cuda", name, topology=topology, target_config=description))


def tpu_mesh(name: str = "v6e:2x2", devices: int = 1) -> Mesh:
    """A mesh of the first `devices` TPU chips of the topology `name`, such as "v5e:2x2".

    libtpu asks the cloud's metadata server where it runs, and waits long where there is none, and
    lets one process a machine load it: set TPU_SKIP_MDS_QUERY=1 and ALLOW_MULTIPLE_LIBTPU_LOAD=true
    before JAX starts.
    """
    return Mesh(described_devices("tpu", name)[:devices])
