"""What torch.compile is not to look into. Imported when it compiles: to disable it for a function imports it.

Ranks talk to one another, and read what the others said.
"""

import torch

from softmax_fused.distributed import linear, rows, vocab_parallel

compute = torch.compiler.disable(vocab_parallel.compute)  # type: ignore[no-untyped-call]
"""The loss of logits divided among ranks."""

compute_rows = torch.compiler.disable(rows.compute)  # type: ignore[no-untyped-call]
"""The outputs of rows of such logits."""

compute_linear = torch.compiler.disable(linear.compute)  # type: ignore[no-untyped-call]
"""The loss of a linear layer that is divided among ranks."""

compute_linear_rows = torch.compiler.disable(linear.compute_rows)  # type: ignore[no-untyped-call]
"""The outputs of rows of such a layer."""
