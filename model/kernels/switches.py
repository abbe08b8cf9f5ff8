"""What was made for GPUs beside something else, is off, and waits for a GPU to run it. This is
where to turn it on.

Read by kernels/attention (gpu.py, gpu_decode.py), model/projection.py and model/programs.py. Tests,
`tune_kernels`, `tune_products` and `quire bench kernels` choose it whatever stands here. Programs
that are stored for the next start are found by the text of this file too.
"""

from __future__ import annotations

from typing import Literal

# An H200 has run "mosaic" (attention backend "gpu_mosaic"): as exact as "triton", and 603 TFLOP/s
# where that makes 392 (2,048 tokens over 6,144 cached, Llama-3.1-8B's heads).
PROMPTS_BY: Literal["triton", "mosaic"] = "mosaic"
"""The kernel for the prompt rows of large steps (attention/gpu.py says which) where both can
serve."""

# No GPU has run "stream" yet (attention backend "gpu_stream").
DECODE_BY: Literal["items", "stream"] = "items"
"""The kernel for decode rows: an item of a row a program (gpu_decode.py), or an equal share of all
rows (gpu_stream.py)."""

# No GPU has run it inside yet (attention backend "gpu_merge_inside").
MERGE_INSIDE = False
"""Whether the parts of a decode row are merged by the program that finishes last, or else by a
second kernel."""

PROJECTION: Literal["xla", "norms", "gemv"] = "gemv"
"""How a GPU multiplies few tokens by a matrix where it has the choice: "norms" has the sum and the
norm between two products in one kernel; "gemv" is that, and products of one token by matrices that
were measured are one kernel with all that surrounds them."""

NORM_TOKENS = 63
"""The most tokens for "norms". From 64 on (model/compile.py) products are the vendor's, which add
the residual themselves, and of the norm alone XLA makes one kernel."""

# No GPU has run "gpu" yet.
WRITER: Literal["scatter", "gpu"] = "scatter"
"""How a GPU writes K and V: "gpu" rotates them, and the queries, in the same kernel."""

# No GPU has run it yet.
EARLY_LAUNCH = False
"""Whether kernels of ours let the next start while they run (early_launch.py)."""
