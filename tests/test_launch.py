"""The kernels' host side: layouts, tiles, and how often something is launched."""

from typing import Any

import pytest
import torch

from softmax_fused import cross_entropy, cross_entropy_rows, log_softmax, softmax
from softmax_fused.backends.triton import cross_entropy as triton_cross_entropy
from softmax_fused.backends.triton import launch, tiles
from softmax_fused.backends.triton.layout import merge_rows
from softmax_fused.backends.triton.plan import Launch
from softmax_fused.kernels.cross_entropy import cross_entropy_forward
from tests.cases import make_indices, make_logits
from tests.conftest import Place


@pytest.mark.parametrize(
    ("shape", "strides", "sizes", "merged"),
    [
        ((4, 6), [(6, 1)], (24,), [(1,)]),
        ((4, 6), [(12, 1)], (4, 6), [(12, 1)]),
        ((4, 6), [(12, 2), (6, 1)], (24,), [(2,), (1,)]),
        ((4, 6), [(12, 2), (1, 4)], (4, 6), [(12, 2), (1, 4)]),
        ((4, 1, 6), [(6, 99, 1)], (24,), [(1,)]),
        ((4, 6), [(0, 0)], (24,), [(0,)]),
        ((1, 1), [(5, 7)], (1,), [(0,)]),
        ((), [()], (1,), [(0,)]),
    ],
)
def test_merge_rows(shape: tuple, strides: list, sizes: tuple, merged: list) -> None:
    assert merge_rows(shape, *strides) == (sizes, tuple(merged))


@pytest.mark.parametrize("classes", [1, 2, 10, 19, 128])
@pytest.mark.parametrize("sizes", [(1,), (3,), (256,), (257,), (60_000,), (16, 524_288), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tiles_are_powers_of_two_that_fit_registers(
    classes: int, sizes: tuple[int, ...], adjacent: bool, itemsize: int
) -> None:
    tile = tiles.choose_tile(classes, sizes, adjacent, itemsize)
    for number in (tile.rows, tile.classes, tile.warps):
        assert number > 0
        assert number & (number - 1) == 0
    assert tile.rows * tile.classes / (tile.warps * tiles.WARP) <= 32  # elements a thread
    assert tile.classes < 2 * classes
    assert tile.rows < 2 * sizes[-1]


@pytest.mark.parametrize("table", [tiles.tables.one_pass, tiles.tables.two_pass], ids=["one pass", "two passes"])
@pytest.mark.parametrize("classes", [129, 1000, 4096, 32_000, 50_257, 128_256, 2**31])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_long_rows_go_in_whole_vectors(table: tuple, classes: int, itemsize: int) -> None:
    tile = tiles.long_tile(classes, itemsize, table)
    assert tile.vector * itemsize == 16
    assert tile.lanes == tile.warps * tiles.WARP <= 1024
    assert tile.classes % (tile.lanes * tile.vector) == 0
    assert tile.classes // tile.lanes <= 32  # elements a thread
    assert not tile.whole or tile.classes >= classes // tile.vector * tile.vector  # the rest is the row's edge


def test_other_tile_sizes_hold_within_a_block_alone() -> None:
    table = tiles.tables.one_pass
    before = tiles.long_tile(1000, 2, table), tiles.choose_tile(10, (60_000,), True, 2)
    with tiles.override(whole_row_bytes=0, contiguous_class_block=4):
        assert not tiles.long_tile(1000, 2, table).whole
        assert tiles.choose_tile(10, (60_000,), True, 2).classes == 4
    assert (tiles.long_tile(1000, 2, table), tiles.choose_tile(10, (60_000,), True, 2)) == before
    assert before[0].whole


def test_few_long_rows_are_split() -> None:
    assert tiles.split_rows(8192, 128_256, 2048) == 1
    assert tiles.split_rows(512, 128_256, 2048) == 1
    assert tiles.split_rows(64, 128_256, 2048) == 8
    assert tiles.split_rows(1, 128_256, 2048) == 31  # two steps a program at least
    assert tiles.split_rows(1, 1000, 256) == 1


def test_floats_reach_kernels_in_double_precision() -> None:
    for value in (0.1, 1 / 3, 1e-3, 1.0):
        high, low = launch.split(value)
        assert abs(high + float(torch.tensor(low, dtype=torch.float32)) - value) <= 1e-15 * value
        assert float(torch.tensor(high, dtype=torch.float32)) == high
    assert launch.split(0.0) is None


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is launched, by name."""
    names: list[str] = []
    real = Launch.__call__

    def record(self: Launch, *tensors: Any) -> None:
        with_gradient = self.kernel is cross_entropy_forward and tensors[1][2][0] is not None
        names.append(self.kernel.fn.__name__ + ("_backward" if with_gradient else ""))
        real(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", record)
    return names


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("shape", "programs"),
    [((256, 10), "one"), ((600, 10), "many"), ((2, 4, 5, 5), "many"), ((5, 1500), "many"), ((2, 5000), "split")],
    ids=str,
)
def test_one_launch_each_way(
    kernels: Place, launches: list[str], shape: tuple[int, ...], programs: str, reduction: str
) -> None:
    logits, target = make_logits(shape, torch.float32, kernels.device), make_indices(shape, kernels.device)
    with tiles.override(target_programs=8):
        loss = cross_entropy(logits, target, reduction=reduction, backend="triton")
        assert launches == ["cross_entropy_forward"]
        launches.clear()
        torch.autograd.grad(loss, logits, torch.ones_like(loss))
        assert launches == ["cross_entropy_backward"]
        launches.clear()
        loss = cross_entropy(logits, target, reduction=reduction, backend="triton", grad_in_forward=True)
        if programs == "split":  # splitting the rows is worth more
            assert launches == ["cross_entropy_forward"]
        else:
            first = ["cross_entropy_weights"] if programs == "many" and reduction == "mean" else []
            assert launches == [*first, "cross_entropy_forward_backward"]
        launches.clear()
        torch.autograd.grad(loss, logits, torch.ones_like(loss))
        assert launches == ["cross_entropy_backward"]


@pytest.mark.parametrize("shape", [(600, 10), (2, 4, 5, 5), (5, 1500)], ids=str)
def test_softmax_and_outputs_of_rows_are_one_launch_each_way(
    kernels: Place, launches: list[str], shape: tuple[int, ...]
) -> None:
    logits, target = make_logits(shape, torch.float32, kernels.device), make_indices(shape, kernels.device)
    for function in (softmax, log_softmax):
        y = function(logits, 1, backend="triton")
        torch.autograd.grad(y, logits, torch.ones_like(logits).contiguous())
    assert launches == ["softmax_forward", "softmax_backward"] * 2
    launches.clear()
    rows = cross_entropy_rows(logits, target, backend="triton")
    (rows.loss + rows.logsumexp + rows.entropy).sum().backward()
    assert launches == ["row_outputs_forward", "row_outputs_backward"]


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_saved_that_nobody_needs(kernels: Place, monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    kept = []
    real = triton_cross_entropy.loss
    monkeypatch.setattr(
        triton_cross_entropy, "loss", lambda *args, **options: (kept.append(real(*args, **options)), kept[-1])[1]
    )
    logits = make_logits((8, 10), torch.float32, kernels.device)
    cross_entropy(logits if grad else logits.detach(), make_indices((8, 10), kernels.device), backend="triton")
    assert [tuple(tensor.shape) for tensor in kept[0][1]] == ([(3 * 8 + 1,)] if grad else [])


OPTIONS = [{}, {"grad_in_forward": True}, {"inplace_backward": True}]


def gradient(logits: torch.Tensor, target: torch.Tensor, options: dict[str, bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient, of logits that an operation made."""
    loss = cross_entropy(logits * 1, target, **options)
    return loss, torch.autograd.grad(loss, logits)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("shape", [(64, 1000), (600, 10), (4, 50_257)], ids=str)
    def test_no_host_synchronisation(self, shape: tuple[int, ...], options: dict[str, bool]) -> None:
        logits, target = make_logits(shape, torch.float32, "cuda"), make_indices(shape, "cuda")
        weight = torch.ones(shape[1], device="cuda")
        gradient(logits, target, options)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradient(logits, target, options)
            cross_entropy(logits * 1, target, weight, label_smoothing=0.1, **options).backward()
            softmax(logits, 1).log().sum().backward()
            rows = cross_entropy_rows(logits, target, weight, softcap=30.0)
            (rows.loss + rows.logsumexp + rows.entropy).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("shape", [(256, 10), (600, 10), (64, 32_000), (600, 32_000), (4, 19, 64, 64)], ids=str)
    def test_cuda_graph_replays_what_eager_computes(self, shape: tuple[int, ...], options: dict[str, bool]) -> None:
        logits, target = make_logits(shape, torch.float32, "cuda"), make_indices(shape, "cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradient(logits, target, options)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, grad = gradient(logits, target, options)
        for _ in range(3):
            with torch.no_grad():
                logits.copy_(torch.randn_like(logits))
            graph.replay()
            expected, right = gradient(logits, target, options)
            assert torch.equal(loss, expected)
            assert torch.equal(grad, right)

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_the_same_every_time(self, options: dict[str, bool]) -> None:
        for shape in ((5000, 10), (4096, 1000), (4, 19, 128, 128)):
            logits, target = make_logits(shape, torch.float32, "cuda"), make_indices(shape, "cuda")
            loss, grad = gradient(logits, target, options)
            for _ in range(5):
                again = gradient(logits, target, options)
                assert torch.equal(again[0], loss)
                assert torch.equal(again[1], grad)

    @pytest.mark.parametrize(
        ("options", "buffers"), [({}, 1), ({"grad_in_forward": True}, 1), ({"inplace_backward": True}, 0)], ids=str
    )
    def test_extra_memory_in_logits_sized_buffers(self, options: dict[str, bool], buffers: int) -> None:
        leaf, target = make_logits((1024, 32_000), torch.bfloat16, "cuda"), make_indices((1024, 32_000), "cuda")
        logits = leaf * 1
        torch.autograd.grad(cross_entropy(leaf[:8] * 1, target[:8], **options), leaf)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(cross_entropy(logits, target, **options), logits)
        grown = torch.cuda.max_memory_allocated() - before
        assert grown <= (buffers + 0.01) * logits.nbytes

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_more_than_2_to_the_31_elements(self, options: dict[str, bool]) -> None:
        rows, classes = 17_000, 128_256
        if torch.cuda.mem_get_info()[0] < 20e9:
            pytest.skip("needs 20 GB of free GPU memory")
        logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        with torch.no_grad():
            logits[-1, 7] = 20
        target = torch.full((rows,), 7, device="cuda")
        made = logits * 1
        loss = cross_entropy(made, target, reduction="none", **options)
        (grad,) = torch.autograd.grad(loss, made, torch.ones_like(loss))
        uniform = torch.tensor(float(classes)).log().bfloat16()
        assert (loss[:-1].cpu() == uniform).all()
        assert loss[-1] < 1e-3
        assert grad[-2, 7] == -1
        assert grad[-1, 7].abs() < 1e-3
