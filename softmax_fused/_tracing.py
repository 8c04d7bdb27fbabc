"""What is asked of torch.compile while it traces. Imported then alone: it imports the compiler."""

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def exporting() -> bool:
    """Whether the trace is torch.export's. Called while tracing, and not traced.

    torch.compiler.is_exporting, where it is traced, is true under torch.compile too before torch 2.12. Called, it is
    right, except in the strict mode of torch 2.7, where only the tracer knows.
    """
    return torch.compiler.is_exporting() or (torch.__version__ < "2.8" and InstructionTranslator.current_tx().export)
