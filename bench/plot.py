"""The tables and figures of speed from bench/results: `make bench-plot`, or python -m bench.plot [--check].

docs/performance.md has all of them, README some rows. --check writes nothing, and exits with 1 if either is not what
the results give.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, too

from bench import figures, host, linear, tables
from softmax_fused.training.wording import plural

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
PERFORMANCE = ROOT / "docs/performance.md"
IMAGES = Path("docs/images")
DOCUMENTS = {"README.md": ("summary",), "docs/performance.md": ("cpu", "host", "gpu", "predicted")}
"""The files that hold tables, and the names of the markers in each."""

NOT_ON_A_GPU = "**Not measured on a GPU yet.** `make bench-gpu` does, in one command."

TITLES = {
    "tests": "",
    "loss": "The loss, torch eager's time over others':",
    "softmax": "Softmax, torch eager's time over others':",
    "copy": "Loss and gradient, or softmax and gradient, in percent of the rate of a copy, measured in the same run:",
    "memory": "Peak memory of the same, beyond logits and target, in units of the logits:",
    "launches": "Small batches, where launches and the host decide:",
    "linear": "Linear layer, loss and gradients, torch's figures and what others take of them, below 1 is better:",
    "epoch": "An epoch of softmax regression in the lab, 60,000 images in batches of 256, against a bare loop:",
    "kernels": "Kernels in bfloat16: the time that bytes, at the copy's rate, issue slots and EX2 allow at least, and "
    "the time taken:",
    "absent": "",
}

PREDICTED = """## On an H200, predicted from the machine code, not measured
`python bench/codegen.py` counts what the compiler makes of the kernels for sm_90 and says what bytes, issue slots and
EX2 allow at best: no kernel can be faster, a real one will be slower. Other types and small shapes are in
bench/results/codegen.json.

<details><summary>Instructions a logit and least times</summary>

{}

</details>"""


def records(results: Path) -> dict[str, dict[str, Any]]:
    """By file name; other files in the folder are not of this format."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    ours = {stem: it for stem, it in found.items() if isinstance(it, dict) and {"machine", "points"} <= it.keys()}
    return dict(sorted(ours.items(), key=lambda item: item[1]["machine"].get("busy", 0)))  # idle machines first


def provenance(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = [machine["name"]]
    where += [f"{machine['threads']} {plural('thread', machine['threads'])}"] if machine.get("threads") else []
    where += [f"beside {machine['busy']} busy {plural('process', machine['busy'])}"] if machine.get("busy") else []
    where += [f"driver {machine['driver']}"] if machine.get("driver") else []
    where += [f"copy {record['copy_gb_per_s']:,.0f} GB/s"] if record["copy_gb_per_s"] else []
    if "first_write_gb_per_s" in record:
        where.append(f"first write to fresh memory {record['first_write_gb_per_s']:.1f} GB/s")
    versions = [f"{name} {version}" for name, version in record["versions"].items() if version]
    remarks = [record["note"]] if record.get("note") else []
    remarks += [] if record["complete"] else ["The run was stopped: cases are missing."]
    return " ".join([f"{', '.join(where)}; {', '.join(versions)}; {record['date']}; `{record['command']}`.", *remarks])


def section(stem: str, record: dict[str, Any]) -> str:
    """A machine's tables and pictures."""
    points, on_gpu = record["points"], record["machine"]["device"] == "cuda"
    parts = [provenance(record)]
    parts += gpu_tables(record) if on_gpu else [tables.speed_table(points), tables.memory_sentence(points)]
    parts += [
        f"![Loss and gradient, times faster than torch, by shape of the logits]({IMAGES.name}/{name})"
        for name in figures.figure_names(stem, record)
    ]
    return "\n\n".join(filter(None, parts))


def gpu_tables(record: dict[str, Any]) -> list[str]:
    """What bench.gpu has found, a sentence before each table; parts that found nothing leave none."""
    of_kind = {kind: [it for it in record["points"] if tables.kind(it) == kind] for kind in tables.KINDS}
    compared = [*of_kind["loss"], *of_kind["softmax"]]
    found = [
        (TITLES["tests"], tables.tests_sentence(record["tests"]) if record.get("tests") else ""),
        (TITLES["loss"], tables.speed_table(of_kind["loss"])),
        (TITLES["softmax"], tables.speed_table(of_kind["softmax"])),
        (TITLES["copy"], tables.provider_table(compared, tables.share_of_copy, "{:.0f}")),
        (TITLES["memory"], tables.provider_table(compared, tables.in_logits, "{:.2f}")),
        (TITLES["launches"], tables.launch_table([*of_kind["step"], *of_kind["loss"]])),
        (TITLES["linear"], linear.table(record.get("linear", []))),
        (TITLES["epoch"], tables.epoch_table(record.get("epoch", []))),
        (TITLES["kernels"], tables.kernels_table(record.get("kernels", []))),
        (TITLES["absent"], tables.absent_sentence(record)),
    ]
    return ["\n\n".join(filter(None, [title, table])) for title, table in found if table]


def blocks(results: Path) -> dict[str, str]:
    """What belongs between the markers, by their names."""
    found = records(results)
    by_device = {
        device: [section(stem, record) for stem, record in found.items() if record["machine"]["device"] == device]
        for device in ("cpu", "cuda")
    }
    codegen = results / "codegen.json"
    predicted = tables.predicted_table(json.loads(codegen.read_text())) if codegen.exists() else ""
    return {
        "summary": summary(found.get("cpu-numba") or found.get("cpu")),
        "cpu": "\n\n".join(by_device["cpu"]),
        "host": "\n\n".join(host_section(json.loads(path.read_text())) for path in sorted(results.glob("host-*.json"))),
        "gpu": "\n\n".join(by_device["cuda"]) or NOT_ON_A_GPU,
        "predicted": PREDICTED.format(predicted) if predicted else "",
    }


def summary(record: dict[str, Any] | None) -> str:
    """The rows of the CPU that README shows."""
    return "" if record is None else f"{tables.summary_table(record['points'])}\n\n{provenance(record)}"


def host_section(record: dict[str, Any]) -> str:
    """What calls cost the host of a machine."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return f"{host.table(record)}\n\n{record['machine']['name']}; {versions}; {record['date']}; `{record['command']}`."


def fill(name: str, text: str, found: dict[str, str]) -> str:
    """Put what was found between the markers of a document, which must have them."""
    for block in DOCUMENTS[name]:
        pattern = rf"(<!-- speed:{block} -->\n).*?(<!-- /speed:{block} -->)"
        inside = f"\n{found[block]}\n\n" if found[block] else ""
        text, count = re.subn(pattern, lambda marks, inside=inside: marks[1] + inside + marks[2], text, flags=re.S)
        if count != 1:
            raise ValueError(
                f"{name} must have <!-- speed:{block} --> and <!-- /speed:{block} --> once; has it {count} times"
            )
    return text


def missing_images(text: str, root: Path) -> list[str]:
    names = re.findall(rf"\]\({IMAGES.name}/(speed-[^)]+)\)", text)
    return [f"{IMAGES / name}" for name in names if not (root / IMAGES / name).exists()]


def check(results: Path = RESULTS, root: Path = ROOT) -> list[str]:
    """Return what is out of date."""
    texts, found = {name: (root / name).read_text() for name in DOCUMENTS}, blocks(results)
    stale = [f"{name} differs from {results.name}" for name, text in texts.items() if fill(name, text, found) != text]
    return stale + [f"{name} is missing" for text in texts.values() for name in missing_images(text, root)]


def write(results: Path = RESULTS, root: Path = ROOT) -> None:
    """Write tables and pictures."""
    found = blocks(results)
    for name in DOCUMENTS:
        (root / name).write_text(fill(name, (root / name).read_text(), found))
    for stem, record in records(results).items():
        figures.draw_all(root / IMAGES, stem, record)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        problems = check()
        sys.exit(f"{'; '.join(problems)}: run make bench-plot" if problems else 0)
    write()
