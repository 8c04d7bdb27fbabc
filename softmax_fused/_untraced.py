"""What torch.compile is not to look into; imported when it compiles, because to make such a function imports it."""

import torch

from softmax_fused import distributed

compute = torch.compiler.disable(distributed.compute)  # type: ignore[no-untyped-call]
"""The loss of divided logits: ranks that talk to one another, and read what the others said."""
