"""The CPU's table: `make bench-cpu`, or python -m bench.cpu [--json FILE] [--minutes M] [--busy].

Wants an otherwise idle machine; --busy measures beside one busy process a core, as DataLoader workers are.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, too

from bench.cases import STEP, Case
from bench.clocks import CpuClock, first_write_bandwidth
from bench.memory import fill_peaks
from bench.record import main, write_json

LARGE = [(2048, 10_000), (512, 32_000), (256, 128_256)]
SHAPES = [*LARGE, (60_000, 10), (4096, 1000), (256, 10), (16, 19, 128, 256), (1, 19, 512, 1024)]
LARGE_CASES = [Case(shape, torch.bfloat16) for shape in LARGE]
ROWS = [Case(shape, torch.float32, operation="rows") for shape in (LARGE[0], *SHAPES[3:7])]
CASES = [Case(shape, torch.float32) for shape in SHAPES] + LARGE_CASES + ROWS + [STEP]
LARGEST = Case((256, 128_256), torch.float32)

if __name__ == "__main__":
    path = main("bench.cpu", CASES, CpuClock, minutes=3.5, copy_bytes=2**28)
    record = json.loads(path.read_text())
    if "busy" not in record["machine"]:
        record["first_write_gb_per_s"] = round(first_write_bandwidth(2**28), 1)
        fill_peaks(record["points"], LARGEST)
        write_json(path, record)
