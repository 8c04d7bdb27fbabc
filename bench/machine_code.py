"""Count what an NVIDIA kernel's machine code costs: registers, stack, and every inner loop's instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


class Loop(NamedTuple):
    """One turn of a loop that has no other inside."""

    instructions: int
    ex2: int
    shuffles: int
    barriers: int
    load_bits: int
    widths: tuple[int, ...]  # of every global load and store
    stores: int

    @property
    def narrowest(self) -> int:
        return min(self.widths)


class Code(NamedTuple):
    """A kernel."""

    registers: int
    stack: int
    local_accesses: int
    loops: list[Loop]

    def element_loops(self) -> list[Loop]:
        """Return the loops that an element of the logits passes: one that reads, one that reads and writes, or both.

        Of several such loops (the compiler unrolls and splits; the ends of rows have their own), the one with the
        widest accesses and the most elements a turn: where the bulk goes through.
        """
        found = []
        exponentials = any(loop.ex2 for loop in self.loops)  # in float64 there is no EX2; else the rest is sums of rows
        for wanted in (False, True):
            group = [loop for loop in self.loops if loop.load_bits and bool(loop.stores) is wanted]
            group = [loop for loop in group if loop.ex2 or not exponentials]
            if group:
                found.append(max(group, key=lambda loop: (loop.narrowest, loop.load_bits, loop.instructions)))
        return found


def run(*arguments: str) -> str:
    return subprocess.run([str(CUOBJDUMP), *arguments], capture_output=True, text=True, check=True).stdout


def width(parts: list[str]) -> int:
    """Return the bits that an opcode such as LDG.E.128 moves for one lane."""
    return next((BITS[part] for part in parts if part in BITS), 32)


def count(body: list[str]) -> Loop:
    """Count one loop's body; predicates are not part of an opcode."""
    names = [re.sub(r"^@!?\S+\s+", "", text) for text in body]
    accesses = [
        (parts[0], width(parts))
        for parts in (name.split()[0].split(".") for name in names)
        if parts[0] in ("LDG", "STG")
    ]
    return Loop(
        len(names),
        sum(name.startswith("MUFU.EX2") for name in names),
        sum(name.startswith("SHFL") for name in names),
        sum(name.startswith("BAR") for name in names),
        sum(bits for kind, bits in accesses if kind == "LDG"),
        tuple(bits for _, bits in accesses),
        sum(kind == "STG" for kind, _ in accesses),
    )


def inner_loops(lines: list[tuple[int, str]]) -> list[Loop]:
    """Find backward branches whose body holds no other."""
    spans = []
    for address, text in lines:
        jump = re.search(r"\bBRA(?:\.U)?\s+(?:\S+,\s+)?(?:`\(\S+\)|0x([0-9a-f]+))", text)
        if jump and jump[1] and int(jump[1], 16) < address:
            spans.append((int(jump[1], 16), address))
    inner = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    return [count([text for address, text in lines if start <= address <= end]) for start, end in inner]


def inspect(cubin: bytes) -> Code:
    """Disassemble a kernel and count."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run("--dump-resource-usage", file.name)
        sass = run("--dump-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    lines = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    return Code(registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", sass)), inner_loops(lines))
