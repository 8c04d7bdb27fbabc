"""What torch.compile is not to look into; imported when it compiles, because to make such a function imports it."""

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator

from softmax_fused.distributed import vocab_parallel

compute = torch.compiler.disable(vocab_parallel.compute)  # type: ignore[no-untyped-call]
"""The loss of divided logits: ranks that talk to one another, and read what the others said."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def exporting() -> bool:
    """Whether the trace is torch.export's. Called while tracing, and not traced.

    torch.compiler.is_exporting, where it is traced, is true under torch.compile too before torch 2.12. Called, it is
    right, except in the strict mode of torch 2.7, where only the tracer knows.
    """
    return torch.compiler.is_exporting() or (torch.__version__ < "2.8" and InstructionTranslator.current_tx().export)
