"""PTX is searched for sums over lanes whose terms are rounded differently."""

import pytest

from bench.machine_code import fused_reductions, parse_ptx

SHUFFLE = "shfl.sync.bfly.b32 \t%r4, %r3, 16, 31, -1;"


def ptx(*lines: str) -> str:
    return "\n".join(f"\t{line}\n$L__tmp1:\n\t.loc\t1 9 0" for line in lines)


@pytest.mark.parametrize(
    "lines",
    [
        ("mul.f32 \t%r3, %r1, %r2;", SHUFFLE, "fma.rn.f32 \t%r5, %r1, %r2, %r4;"),
        ("mul.f32 \t%r3, %r1, %r2;", SHUFFLE, "fma.rn.f32 \t%r5, %r2, %r1, %r4;"),
        ("mul.f32 \t%r3, %r1, 0f40000000;", "shfl.sync.bfly.b32 %r4|%p1, %r3, 1, 31, -1;", "add.f32 \t%r5, %r4, %r3;"),
        (
            "mul.f32 \t%r6, %r1, %r2;",
            "selp.f32 \t%r3, 0f00000000, %r6, %p1;",
            SHUFFLE,
            "@%p2 fma.rn.f32 \t%r5, %r1, %r2, %r4;",
        ),
        (
            "mul.f64 \t%rd3, %rd1, %rd2;",
            "mov.b64 \t{%r3, %r9}, %rd3;",
            SHUFFLE,
            "mov.b64 \t%rd4, {%r4, %r8};",
            "fma.rn.f64 \t%rd5, %rd1, %rd2, %rd4;",
        ),
    ],
    ids=["fused", "factors exchanged", "left to the assembler", "through a selection", "float64"],
)
def test_a_product_fused_on_one_side_of_a_shuffle_is_found(lines: tuple[str, ...]) -> None:
    text = " ".join(lines[-1].split()).rstrip(";").removeprefix("@%p2 ")
    assert fused_reductions(ptx(*lines)) == [text]


@pytest.mark.parametrize(
    "lines",
    [
        ("fma.rn.f32 \t%r3, %r1, %r2, 0f00000000;", SHUFFLE, "add.f32 \t%r5, %r3, %r4;"),
        ("mul.f32 \t%r6, %r1, %r2;", "selp.f32 \t%r3, %r6, 0f00000000, %p1;", SHUFFLE, "add.f32 \t%r5, %r3, %r4;"),
        ("mul.rn.f32 \t%r3, %r1, %r2;", SHUFFLE, "add.rn.f32 \t%r5, %r3, %r4;"),
        ("mul.f32 \t%r3, %r1, %r2;", SHUFFLE, "fma.rn.f32 \t%r5, %r1, %r7, %r4;"),
        ("mul.f32 \t%r3, %r1, %r2;", SHUFFLE, "max.f32 \t%r5, %r3, %r4;"),
        ("add.f32 \t%r3, %r1, %r3;", "mov.b32 \t%r3, %r3;", SHUFFLE, "add.f32 \t%r5, %r3, %r4;"),
    ],
    ids=["rounded", "selected", "rounding named", "another product", "maximum", "no product"],
)
def test_sums_of_rounded_terms_are_not(lines: tuple[str, ...]) -> None:
    assert fused_reductions(ptx(*lines)) == []


def test_lines_of_ptx_are_taken_apart() -> None:
    (line,) = parse_ptx("\t@!%p3 shfl.sync.bfly.b32 \t%r4|%p1, %r3, 16, 31, -1;")
    assert line.name == "shfl.sync.bfly.b32"
    assert (line.results, line.sources[0]) == (["%r4", "%p1"], "%r3")
    (line,) = parse_ptx("mov.b64 \t{%r3, %r9}, %rd3;")
    assert (line.results, line.sources) == (["%r3", "%r9"], ["%rd3"])
