"""The report page: its content, that it is a single file without scripts, and how a browser shows it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from softmax_fused.training.errors import LabError
from softmax_fused.training.report.charts import HEIGHT, MAX_POINTS, WIDTH, line_chart
from softmax_fused.training.report.page import write_report
from softmax_fused.training.runs.compare import compare
from softmax_fused.training.runs.run import train
from tests.browser import browser, find_chromium
from tests.lab import QUIET, SMALL, few_digits, metrics_of, run_cli

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

RECORD = {
    "config": {"dataset": "fashion-mnist", "model": "softmax", "loss": "fused", "lr": 0.1, "batch_size": 256},
    "versions": {"python": "3.12.1", "torch": "2.15.0", "hip": None},
    "device": "cpu",
    "dataset": {"name": "fashion-mnist", "classes": CLASSES, "fallback": None},
    "train_loss": [0.7, 0.5, 0.45],
    "train_accuracy": [0.7, 0.8, 0.82],
    "test_accuracy": [0.71, 0.79, 0.81],
    "epoch_seconds": [1.5, 1.25, 1.0],
    "per_class_accuracy": dict.fromkeys(CLASSES, 0.9),
    "confusion_matrix": [[900 if row == column else 11 for column in range(10)] for row in range(10)],
}


def make_run(folder: Path, **changes: Any) -> Path:
    """A run folder with a gallery; a change to None removes a key."""
    folder.mkdir(parents=True)
    record = {name: value for name, value in {**RECORD, **changes}.items() if value is not None}
    (folder / "metrics.json").write_text(json.dumps(record))
    Image.new("RGB", (1680, 900), "#456").save(folder / "predictions.png")
    return folder


class Reader(HTMLParser):
    """Collects the page's text, its addresses, and checks that elements are closed in order."""

    EMPTY = ("meta", "link", "img", "line", "polyline")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_real_runs_of_both_commands_are_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = train(SMALL, output=tmp_path / "one", data=few_digits(), reporter=QUIET)
    both = compare(["torch", "scratch"], SMALL, output=tmp_path / "both", data=few_digits(), reporter=QUIET)
    outcome = run_cli(capsys, "report", one, both)
    assert (outcome.status, outcome.out, outcome.err) == (0, f"{one / 'report.html'}\n", "")
    page = Reader((one / "report.html").read_text())
    assert page.tags.count("img") == 1  # the gallery; the page draws curves, confusion matrix and comparison itself
    assert f"{metrics_of(one)['train_loss'][-1]:.4f}" in page.text
    for words in ("Confusion matrix", "Predictions on the test set", "Off torch by", "both: scratch", "scikit-learn"):
        assert words in page.text
    assert not list(tmp_path.glob("*/.*"))


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    html = write_report([make_run(tmp_path / "run")]).read_text()
    page = Reader(html)
    assert "script" not in page.tags
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", re.sub(r'"data:[^"]*"', "", html))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html


def test_names_of_runs_and_settings_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<script>alert(1)<", config={"model": "<img src=x>", "dataset": '"&'})
    page = Reader(write_report([run]).read_text())
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert "<script>alert(1)<" in page.text
    assert "<img src=x>" in page.text


@pytest.mark.parametrize("key", sorted(RECORD))
def test_any_part_may_be_missing(tmp_path: Path, key: str) -> None:
    page = Reader(write_report([make_run(tmp_path / "run", **{key: None}), make_run(tmp_path / "whole")]).read_text())
    assert "Settings, data and versions" in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {"train_loss": [], "train_accuracy": [], "test_accuracy": [], "epoch_seconds": [], "confusion_matrix": []},
        {"test_accuracy": None, "train_accuracy": None, "test_loss": [2.0, 1e-5, 3e-6], "weights": [2.0, -3.4]},
        {"train_loss": [1.0, 1.0, 1.0], "test_accuracy": [0.1]},
        {"config": "text", "dataset": ["list"], "versions": None, "per_class_accuracy": [1], "losses": {"a": 1}},
        {"confusion_matrix": [[1, 2], [3]], "dataset": {"classes": ["a", "b"]}},
        {"losses": {"torch": {"train_loss": [1.0], "loss_us": {"median": 3}}, "ours": {}}, "train_loss": None},
        {"train_loss": [float("nan"), 1.0, 2.0]},
        {"train_loss": 2.5, "dataset": {"classes": 3}, "confusion_matrix": [[1]]},
        {"epochs": 10**400, "test_accuracy": [10**400, 1, 2], "config": {"lr": 10**400}},
        {"losses": {"torch": {"train_loss": 1, "loss_us": {"p20": None, "median": "x", "p80": []}}}},
    ],
    ids=[
        "no epoch",
        "regression",
        "constant",
        "other types",
        "not square",
        "bare comparison",
        "nan",
        "numbers for lists",
        "huge",
        "no times",
    ],
)
def test_odd_records_are_shown_as_far_as_they_go(tmp_path: Path, changes: dict[str, Any]) -> None:
    page = Reader(write_report([make_run(tmp_path / "run", **changes)]).read_text())
    assert "Predictions on the test set" in page.text
    for name, value in changes.items():
        if name == "weights":
            assert "weights 2.0000, -3.4000" in page.text
        if name == "test_loss":
            assert "3.00e-06" in page.text
        if value == []:
            assert "No epoch is done yet." in page.text


def test_replaced_data_are_announced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dataset={"name": "digits", "classes": CLASSES, "fallback": "no such files"})
    assert "Other data. Trained on digits, because" in Reader(write_report([run]).read_text()).text


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place / "run") for place in "ab"]
    page = Reader(write_report(runs, tmp_path / "page.html").read_text())
    assert "run (2)" in page.text
    assert {"#run-1", "#run-2"} <= set(page.addresses)
    assert [path.name for path in runs[0].iterdir() if path.suffix == ".html"] == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "missing argument 'FOLDER...'; see softmax-fused report --help"),
        (["{absent}"], 1, "expected metrics.json or compare.json in {absent}, got no such folder; give folders that"),
        (["{empty}"], 1, "expected metrics.json or compare.json in {empty}, got none; give folders that train or"),
        (["{file}"], 1, "expected metrics.json or compare.json in {file}, got a file; give folders that train or"),
        (["{run}", "{cut}"], 1, "expected JSON in {cut}/metrics.json, got a damaged file (Expecting"),
        (["{deep}"], 1, "expected JSON in {deep}/metrics.json, got a damaged file ("),
        (["{list}"], 1, "expected the record of a run in {list}/metrics.json, got list; leave that folder out"),
        (["{run}", "--out", "{absent}/a.html"], 1, "expected to write {absent}/a.html, got No such file or"),
    ],
    ids=["nothing", "absent", "empty", "file", "damaged", "deep", "list", "output"],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    places = {name: tmp_path / name for name in ("absent", "empty", "file", "run", "cut", "deep", "list")}
    for name in ("empty", "cut", "deep", "list"):
        places[name].mkdir()
    places["file"].touch()
    make_run(places["run"])
    (places["cut"] / "metrics.json").write_text('{"config": ')
    (places["deep"] / "metrics.json").write_text("[" * 100_000)
    (places["list"] / "metrics.json").write_text("[]")
    outcome = run_cli(capsys, "report", *(argument.format(**places) for argument in arguments))
    assert outcome.status == status
    assert outcome.error.startswith(f"error: {message.format(**places)}")
    assert not list(tmp_path.rglob("report.html"))


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "more.png").mkdir()
    with pytest.raises(LabError, match=r"expected a picture in .*more.png, got Is a directory; check the file"):
        write_report([run])


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [1e-9, 3e-9], [-5.0, 1e6], [1e-7, 3.0], [1.0, 1001.0], list(range(1, 10_000)), [0.3] * 40],
)
def test_charts_stay_in_their_box(values: list[float]) -> None:
    chart = line_chart("title", {"a": values, "b": [values[0]]})
    points = [point for line in chart.lines for point in line.points]
    assert len(points) <= MAX_POINTS + 1
    assert all(0 < point.x < WIDTH and 0 < point.y < HEIGHT for point in points)
    assert 1 <= len(chart.y_ticks) <= 8
    assert all(0 < tick.position < HEIGHT for tick in chart.y_ticks)
    assert all(tick.text.isdigit() for tick in chart.x_ticks)
    assert chart.lines[0].points[-1].epoch <= len(values)


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium or Chrome on the path, or playwright's")
def test_a_browser_shows_the_page_completely_in_any_width_and_colour_scheme(tmp_path: Path) -> None:
    long = f"20261121-150000-{'fashion-mnist-softmax-fused-' * 3}"
    loss = {"train_loss": [1.0, 0.9], "loss_us": {"p20": 1, "median": 2, "p80": 3}}
    runs = [make_run(tmp_path / long), make_run(tmp_path / "mlp"), make_run(tmp_path / "both", losses={"torch": loss})]
    page = write_report(runs)
    grounds = {}
    with browser(find_chromium(), tmp_path / "profile") as tab:
        for width in (1280, 390, 320):
            for scheme in ("light", "dark"):
                tab.open(page, width, 800, scheme)
                assert tab.complaints == []
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth === 1680)")
                assert tab.evaluate("document.querySelectorAll('.chart').length") >= 7
                inside = "[...document.querySelectorAll('.chart, dl, p')].every(e => e.scrollWidth <= e.clientWidth)"
                assert tab.evaluate(inside)
                grounds[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert tab.evaluate("[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)")
    assert grounds == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}


def test_epochs_without_a_value_have_no_point() -> None:
    chart = line_chart("Loss", {"train": [3.0, 2.0, 1.0, 0.5], "test": [None, None, 2.0, 1.0]})
    train, test = chart.lines
    assert [(point.epoch, point.value) for point in test.points] == [(3, 2.0), (4, 1.0)]
    assert [point.x for point in test.points] == [point.x for point in train.points[2:]]


def test_values_of_many_magnitudes_get_a_logarithmic_scale() -> None:
    chart = line_chart("Loss", {"train": [100.0, 1.0, 0.01]})
    assert chart.title == "Loss (logarithmic scale)"
    first, second, third = (point.y for point in chart.lines[0].points)
    assert second - first == pytest.approx(third - second)
    assert {"0.01", "1", "100"} <= {tick.text for tick in chart.y_ticks}
    assert line_chart("Loss", {"train": [100.0, 1.0, 0.0]}).title == "Loss"
