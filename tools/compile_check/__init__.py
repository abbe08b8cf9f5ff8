"""Compiles an engine's programs for devices that are not there, and says what came out.

Callers: the tests in tests/tools/compile_check, which keep every backend's whole steps compiling
where there is no accelerator. targets.py describes devices, report.py reads a compiled program.
What such a compile shows: that it compiles, its memory, its HLO. Not speed, not numbers; and
autotuning needs the device, so nothing compiled here is ever a warm start.
"""

from .report import ProgramReport, compile_for
from .targets import gpu_mesh, tpu_mesh, why_not

__all__ = ["ProgramReport", "compile_for", "gpu_mesh", "tpu_mesh", "why_not"]
