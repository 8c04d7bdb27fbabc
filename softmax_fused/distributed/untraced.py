"""What torch.compile is not to look into. Imported when it compiles: to disable it for a function imports it."""

import torch

from softmax_fused.distributed import vocab_parallel

compute = torch.compiler.disable(vocab_parallel.compute)  # type: ignore[no-untyped-call]
"""The loss of logits divided among ranks: they talk to one another, and read what the others said."""
