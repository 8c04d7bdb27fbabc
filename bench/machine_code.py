"""Read what the compiler made of a kernel for NVIDIA GPUs.

The machine code is counted: registers, stack, and every inner loop's instructions. The PTX before it is searched for
sums over lanes in which the lanes disagree.
"""

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
    straight: Loop  # the whole kernel, but for its loops

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
                found.append(max(group, key=lambda loop: (loop.narrowest, loop.load_bits, -loop.instructions)))
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


def loop_spans(lines: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Find backward branches: the addresses of the first and the last instruction of each loop."""
    spans = []
    for address, text in lines:
        jump = re.search(r"\bBRA(?:\.U)?\s+(?:\S+,\s+)?(?:`\(\S+\)|0x([0-9a-f]+))", text)
        if jump and jump[1] and int(jump[1], 16) < address:
            spans.append((int(jump[1], 16), address))
    return spans


def inner_loops(lines: list[tuple[int, str]]) -> list[Loop]:
    """Count the loops that hold no other."""
    spans = loop_spans(lines)
    inner = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    return [count([text for address, text in lines if start <= address <= end]) for start, end in inner]


class Instruction(NamedTuple):
    """One line of PTX."""

    name: str
    results: list[str]
    sources: list[str]
    text: str

    def is_float(self, operation: str) -> bool:
        """Whether it is this operation on float32, float64 or a pair of float32."""
        parts = self.name.split(".")
        return parts[0] == operation and parts[-1] in ("f32", "f64", "f32x2")


def parse_ptx(ptx: str) -> list[Instruction]:
    """Return the instructions of a kernel, registers and constants as their operands."""
    found = []
    for name, operands in re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*);", ptx, re.MULTILINE):
        first, rest = re.fullmatch(r"(\{.*?\}|[^,]*)(.*)", operands).groups()  # type: ignore[union-attr]
        text = " ".join(f"{name} {operands}".split())
        found.append(Instruction(name, re.findall(r"%\w+", first), re.findall(r"[%\w]+", rest), text))
    return found


def fused_reductions(ptx: str) -> list[str]:
    """Return the additions of a sum over lanes in which a lane's own term is an exact product, not a rounded one.

    A lane adds its neighbour's term, which comes rounded through a shuffle, to its own. Where its own is a product
    fused into the addition, the neighbour rounds other terms: both should hold the same sum, and do not. A plain
    addition of a plain product counts, too: the assembler may fuse it.
    """
    code = parse_ptx(ptx)
    made_by: dict[str, list[Instruction]] = {}
    for line in code:
        for register in line.results:
            made_by.setdefault(register, []).append(line)

    def origins(register: str, copies: tuple[str, ...], seen: frozenset[str] = frozenset()) -> list[Instruction]:
        """Return the instructions that made a value, through those that hand it on."""
        found = []
        for line in made_by.get(register, ()):
            if line.name.split(".")[0] not in copies:
                found.append(line)
            elif register not in seen:
                found += [it for source in line.sources for it in origins(source, copies, seen | {register})]
        return found

    def products(register: str, *copies: str) -> list[Instruction]:
        return [line for line in origins(register, ("mov", *copies)) if line.is_float("mul")]

    def received(register: str) -> list[str]:
        """Return what a neighbour's value is to the neighbour."""
        return [line.sources[0] for line in origins(register, ("mov",)) if line.name.startswith("shfl")]

    def fuses(line: Instruction) -> bool:
        if line.is_float("fma"):
            *factors, term = line.sources
            sent = [product for own in received(term) for product in products(own, "selp")]
            return any(sorted(product.sources) == sorted(factors) for product in sent)
        if line.is_float("add") and ".rn" not in line.name:
            pairs = (line.sources, line.sources[::-1])
            own = [mine for mine, other in pairs if mine in received(other)]
            return any(".rn" not in product.name for mine in own for product in products(mine))
        return False

    return [line.text for line in code if fuses(line)]


def inspect(cubin: bytes) -> Code:
    """Disassemble a kernel and count."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run("--dump-resource-usage", file.name)
        sass = run("--dump-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    lines = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    spans = loop_spans(lines)
    outside = [text for address, text in lines if not any(start <= address <= end for start, end in spans)]
    straight = count([text for text in outside if text.split()[0] != "NOP"])
    return Code(registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", sass)), inner_loops(lines), straight)
