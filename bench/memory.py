"""Peak memory of forward + backward beyond logits and target, ours against torch's, each in a process of its own.

Usage: python bench/memory.py [ROWS CLASSES]
"""

import resource
import subprocess
import sys

import torch
import torch.nn.functional as F

import softmax_fused

LOSSES = {"ours": softmax_fused.cross_entropy, "torch": F.cross_entropy}


def growth(provider: str, rows: int, classes: int) -> float:
    """Peak resident memory in units of the logits' size, growth over what was there before the call."""
    logits = torch.randn(rows, classes, requires_grad=True)
    target = torch.randint(0, classes, (rows,))
    small = logits[:8].detach().requires_grad_()
    LOSSES[provider](small, target[:8]).backward()  # libraries and threads are there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    LOSSES[provider](logits, target).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / logits.nbytes


def main(rows: int, classes: int) -> None:
    """Print a line a provider; a peak can only grow, hence the processes."""
    print(f"forward + backward of ({rows}, {classes}) float32, torch {torch.__version__}")
    for provider in LOSSES:
        command = [sys.executable, __file__, provider, str(rows), str(classes)]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(f"{provider:6} {line} logits-sized buffers")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in LOSSES:
        print(f"{growth(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])):.2f}")
    else:
        main(*(map(int, sys.argv[1:]) if len(sys.argv) > 1 else (256, 128_256)))
