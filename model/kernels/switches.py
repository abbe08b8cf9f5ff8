"""Kernels for GPUs that stand beside others: which of them run, and why. All that are on have been
seen to compute right on a GPU (an H200); one that has not would be off, and turned on here.

Read by kernels/attention (gpu.py, gpu_decode.py), kernels/kv_write.py, model/projection.py and
model/programs.py.
Tests, `tune_kernels`, `tune_products` and `quire bench kernels` choose them whatever stands here.
Programs that are stored for the next start are found by the text of this file too.
"""

from __future__ import annotations

from typing import Literal

# As exact as "triton", and 603 TFLOP/s where that makes 392 (an H200, 2,048 tokens over 6,144
# cached, Llama-3.1-8B's heads).
PROMPTS_BY: Literal["triton", "mosaic"] = "mosaic"
"""The kernel for the prompt rows of large steps (attention/gpu.py says which) where both can
serve."""

# On an H200 277 us against 289 for 1,000 rows of 272 tokens, 83 against 85 for 256, 63 against 65
# for 64 rows of 900, and 7 against 13 where none of 1,024 rows decodes.
MERGE_INSIDE = True
"""Whether the parts of a decode row are merged by the program that finishes last, or else by a
second kernel."""

# A decode step of Llama-3.1-8B takes 4.15 ms on an H200 ("xla": 4.42), of Qwen2.5-1.5B 1.58
# ("norms": 1.66).
PROJECTION: Literal["xla", "norms", "gemv"] = "gemv"
"""How a GPU multiplies few tokens by a matrix where it has the choice: "norms" has the sum and the
norm between two products in one kernel; "gemv" is that, and products of one token by matrices that
were measured are one kernel with all that surrounds them."""

NORM_TOKENS = 63
"""The most tokens for "norms". From 64 on (model/compile.py) products are the vendor's, which add
the residual themselves, and of the norm alone XLA makes one kernel."""

# One kernel a layer where rotating and two scatters were five.
WRITER: Literal["scatter", "gpu"] = "gpu"
"""How a GPU writes K and V: "gpu" rotates them, and the queries, in the same kernel."""

# No GPU has run "graph" yet.
SEARCH_BY: Literal["host", "graph"] = "host"
"""Who runs the rounds of the search for what top-k and top-p keep (model/sampling/truncate.py), in
programs that sample what a forward left: the host, which waits for the device before each to learn
whether there is one, also where no row asks for either; or the device, as a loop inside the
program's CUDA graph, which is then one."""
