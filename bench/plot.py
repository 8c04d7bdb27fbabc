"""README's tables and figures of speed from bench/results: `make bench-plot`, or python -m bench.plot [--check].

--check writes nothing, and exits with 1 if README is not what the results give.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, too

from bench import figures, linear, tables
from softmax_fused.training.wording import plural

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
README = ROOT / "README.md"
IMAGES = Path("docs/images")

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

PREDICTED = """### On an H200, predicted from the machine code, not measured
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
        f"![Loss and gradient, times faster than torch, by shape of the logits]({IMAGES / name})"
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
    """What belongs between README's markers."""
    found = records(results)
    by_device = {
        device: [section(stem, record) for stem, record in found.items() if record["machine"]["device"] == device]
        for device in ("cpu", "cuda")
    }
    codegen = results / "codegen.json"
    predicted = tables.predicted_table(json.loads(codegen.read_text())) if codegen.exists() else ""
    return {
        "cpu": "\n\n".join(by_device["cpu"]),
        "gpu": "\n\n".join(by_device["cuda"]) or NOT_ON_A_GPU,
        "predicted": PREDICTED.format(predicted) if predicted else "",
    }


def fill(readme: str, texts: dict[str, str]) -> str:
    """Put each text between its markers; README must have them."""
    for name, text in texts.items():
        pattern = rf"(<!-- speed:{name} -->\n).*?(<!-- /speed:{name} -->)"
        inside = f"\n{text}\n\n" if text else ""
        readme, count = re.subn(pattern, lambda found, inside=inside: found[1] + inside + found[2], readme, flags=re.S)
        if count != 1:
            raise ValueError(
                f"README must have <!-- speed:{name} --> and <!-- /speed:{name} --> once; has it {count} times"
            )
    return readme


def missing_images(readme: str, root: Path) -> list[str]:
    return [name for name in re.findall(r"\]\((docs/images/speed-[^)]+)\)", readme) if not (root / name).exists()]


def check(results: Path = RESULTS, readme: Path = README) -> list[str]:
    """Return what is out of date."""
    text = readme.read_text()
    stale = [] if fill(text, blocks(results)) == text else [f"{readme.name} differs from {results.name}"]
    return stale + [f"{name} is missing" for name in missing_images(text, readme.parent)]


def write(results: Path = RESULTS, readme: Path = README) -> None:
    """Write tables and pictures."""
    readme.write_text(fill(readme.read_text(), blocks(results)))
    for stem, record in records(results).items():
        figures.draw_all(readme.parent / IMAGES, stem, record)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        problems = check()
        sys.exit(f"{'; '.join(problems)}: run make bench-plot" if problems else 0)
    write()
