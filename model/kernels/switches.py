"""Kernels for GPUs that stand beside others, are off, and wait for a GPU to run them. This is where
to turn them on.

Read by kernels/attention (gpu.py, gpu_decode.py) and model/projection.py. Tests, `tune_kernels`,
`tune_products` and `quire bench kernels` choose them whatever stands here. Programs that are stored
for the next start are found by the text of this file too.
"""

from __future__ import annotations

from typing import Literal

# No GPU has run "mosaic" yet (attention backend "gpu_mosaic").
PROMPTS_BY: Literal["triton", "mosaic"] = "triton"
"""The kernel for prompt rows where both can serve."""

# No GPU has run it inside yet (attention backend "gpu_merge_inside").
MERGE_INSIDE = False
"""Whether the parts of a decode row are merged by the program that finishes last, or else by a
second kernel."""

# No GPU has run "gemv" yet (`tune_products`).
PROJECTION: Literal["xla", "gemv"] = "xla"
"""How a GPU multiplies one token or a few by a matrix where both can."""
