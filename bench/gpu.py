"""The GPU's table: `make bench-gpu`, or python -m bench.gpu [--json FILE] [--minutes M]; wants torch and triton alone.

The most telling cases come first, so that a run that is stopped has them.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, too

from bench.cases import STEP, Case
from bench.clocks import FLUSH_BYTES, CudaClock
from bench.record import main

SHAPES = [
    (8192, 32_000),
    (8192, 128_256),
    (8192, 50_304),
    (8192, 262_144),
    (4096, 1000),
    (60_000, 10),
    (256, 10),
    (16, 19, 512, 1024),
]
CASES = [Case(shape, dtype) for dtype in (torch.bfloat16, torch.float32) for shape in SHAPES]
CASES.insert(len(SHAPES), STEP)
CASES += [Case(shape, torch.bfloat16, operation="softmax") for shape in SHAPES[:2]]

if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no GPU here that torch can use; python -m bench.cpu measures the CPU")
    main("bench.gpu", CASES, CudaClock, minutes=5, copy_bytes=FLUSH_BYTES)
