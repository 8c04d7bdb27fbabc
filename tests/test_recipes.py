"""The recipes of docs/integrations.md run as they stand there, and compute what the library itself computes."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmax_fused import functional, modules
from tests.hub import build_hub
from tests.tiny import (
    REASON,
    digits,
    kernels_package,
    language_model,
    lightnings_warnings,
    sentences,
    tokenizer,
    trained_losses,
    unregistered,
)

TEXT = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
RECIPES = {
    title: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for title, text in SECTIONS.items()
}

Names = dict[str, Any]


def run(title: str, names: Names) -> Names:
    """Run a recipe; what it defines is in the names afterwards."""
    (code,) = RECIPES[title]
    exec(compile(code, f"docs/integrations.md: {title}", "exec"), names)
    return names


def classifier() -> Names:
    """What the recipes for plain torch take for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y = digits()
    return {
        "torch": torch,
        "device": "cpu",
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [(x, y)] * 2,
        "x": x,
        "y": y,
    }


def loader(batch_size: int = 16) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*digits()), batch_size=batch_size)


def weights(names: Names) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in names["model"].parameters()]


def by_hand(names: Names, criterion: nn.Module, accumulated: int = 1) -> list[Tensor]:
    """The weights after torch's own loss and as plain a loop as can be."""
    model = copy.deepcopy(names["model"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, (x, y) in enumerate(names["batches"], 1):
        (criterion(model(x), y) / accumulated).backward()
        if i % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.fixture(autouse=True)
def set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # other tests go through Inductor, which takes a quarter of a minute and no memory filled with NaN
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def counted(calls: list[Names], monkeypatch: pytest.MonkeyPatch) -> list[Names]:
    """The calls of our loss, through patch() and through the class."""
    monkeypatch.setattr(modules, "cross_entropy", functional.cross_entropy)
    return calls


def test_every_recipe_is_run_by_a_test() -> None:
    tested = set(re.findall(r'run\("(.*?)"', Path(__file__).read_text()))
    assert {title for title, blocks in RECIPES.items() if blocks} == tested
    assert TEXT.count("```python") == sum(map(len, RECIPES.values())) == len(RECIPES)


def test_plain_torch(counted: list[Names]) -> None:
    names = classifier()
    expected = by_hand(names, nn.CrossEntropyLoss(label_smoothing=0.1))
    torchs = F.cross_entropy
    run("Plain torch", names)
    assert F.cross_entropy is torchs
    assert len(counted) == 2
    torch.testing.assert_close(weights(names), expected)


def test_torch_compile() -> None:
    names = classifier()
    plain = nn.CrossEntropyLoss()(names["model"](names["x"]), names["y"])
    expected = torch.autograd.grad(2 * plain, list(names["model"].parameters()))
    run("torch.compile", names)
    torch.testing.assert_close([p.grad for p in names["model"].parameters()], list(expected))


def test_amp(counted: list[Names]) -> None:
    names = run("AMP with GradScaler", classifier())
    assert len(counted) == 2
    assert names["loss"].dtype is torch.float32


def trainer(folder: Path, **options: Any) -> Names:
    transformers = pytest.importorskip("transformers", reason=REASON)
    pytest.importorskip("accelerate", reason=REASON)
    settings = {"max_steps": 2, "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = transformers.TrainingArguments(str(folder), save_strategy="no", **settings, **options)
    torch.manual_seed(0)
    return {"model": language_model(), "args": args, "dataset": sentences()}


def test_transformers_any_model(counted: list[Names], tmp_path: Path) -> None:
    run("transformers: any model", trainer(tmp_path))
    assert len(counted) == 2


def test_transformers_causal_language_models(tmp_path: Path) -> None:
    """Gradient accumulation included: sentences of different lengths, of which two make a step."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    names = trainer(tmp_path, **options)
    for i, sentence in enumerate(names["dataset"]):
        sentence["labels"][: i + 1] = -100
    theirs = copy.deepcopy(names["model"])
    run("transformers: causal language models", names)
    other = pytest.importorskip("transformers").Trainer(theirs, names["args"], train_dataset=names["dataset"])
    other.train()
    torch.testing.assert_close(trained_losses(names["trainer"]), trained_losses(other), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(names), weights({"model": theirs}), rtol=1e-4, atol=1e-5)


def test_transformers_kernel_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the installed kernels is too old for transformers, the steps of `set_use_kernels` one by one."""
    transformers = pytest.importorskip("transformers", reason=REASON)
    kernels = kernels_package()
    kernel_config = pytest.importorskip(
        "transformers.utils.kernel_config", reason="this transformers has no KernelConfig"
    )
    model = language_model().train()  # before the decorators below: they would mark its other layers, too
    supported = [*kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES, "cpu"]
    monkeypatch.setattr(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", supported)
    if not transformers.utils.is_kernels_available():

        def set_use_kernels(self: Any, use: bool, config: Any) -> None:
            config.sanitize_kernel_mapping(self)
            config.create_compatible_mapping(self)
            with kernels.use_kernel_mapping(config.kernel_mapping, inherit_mapping=False):
                kernels.kernelize(self, mode=kernels.Mode.TRAINING, device="cpu")

        monkeypatch.setattr(transformers.PreTrainedModel, "set_use_kernels", set_use_kernels)
        hub_kernels = transformers.integrations
        monkeypatch.setattr(hub_kernels, "use_kernel_forward_from_hub", kernels.use_kernel_forward_from_hub)
    batch = torch.utils.data.default_collate(sentences())
    expected = model(**batch, num_items_in_batch=50).loss
    grads = torch.autograd.grad(expected, list(model.parameters()))
    run("transformers: a kernel by its KernelConfig", {"model": model, "folder": build_hub(tmp_path)})
    assert model.loss_function.forward.__func__.__module__.startswith("_softmax_fused_")
    for call in (model, torch.compile(model)):
        loss = call(**batch, num_items_in_batch=50).loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), grads)


def test_transformers_kernel_without_kernel_config(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason=REASON)
    kernels_package()
    model = language_model().train()
    batch = torch.utils.data.default_collate(sentences())
    parameters = list(model.parameters())
    expected = model(**batch, num_items_in_batch=50).loss
    grads = torch.autograd.grad(expected, parameters)
    names = {"model": model, "folder": build_hub(tmp_path), "device": "cpu"}
    run("transformers: a kernel without KernelConfig", names)
    assert model.loss_function.forward.__func__.__module__.startswith("_softmax_fused_")
    for call in (model, torch.compile(model)):
        loss = call(**batch, num_items_in_batch=50).loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), grads)
    head = {"hidden_states": model.model(batch["input_ids"]).last_hidden_state, "lm_head_weight": model.lm_head.weight}
    loss = model.loss_function(None, batch["labels"], model.config.vocab_size, 50, **head)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), grads)


def test_kernels(tmp_path: Path) -> None:
    kernels_package()
    names = classifier()
    net = names["model"]
    names["model"] = nn.ModuleDict({"net": net, "criterion": nn.CrossEntropyLoss(label_smoothing=0.1)})
    with unregistered(nn.CrossEntropyLoss):
        run("kernels", names | {"folder": build_hub(tmp_path)})
    criterion = names["model"]["criterion"]
    assert criterion.forward.__func__.__module__.startswith("_softmax_fused_")
    losses = [loss(net(names["x"]), names["y"]) for loss in (criterion, nn.CrossEntropyLoss(label_smoothing=0.1))]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*[torch.autograd.grad(loss, list(net.parameters())) for loss in losses])


@pytest.mark.slow  # importing trl, datasets and pandas takes five seconds
@pytest.mark.filterwarnings("ignore")  # trl's own
def test_trl_supervised_fine_tuning(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason=REASON)
    datasets = pytest.importorskip("datasets", reason=REASON)
    names = trainer(tmp_path)
    settings = {"max_steps": 2, "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    rows = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in names["dataset"]]
    names |= {
        "args": trl.SFTConfig(str(tmp_path), gradient_accumulation_steps=2, bf16=False, save_strategy="no", **settings),
        "dataset": datasets.Dataset.from_list(rows),
        "tokenizer": tokenizer(),
    }
    theirs = copy.deepcopy(names["model"])
    run("TRL: supervised fine-tuning", names)
    options = {"train_dataset": names["dataset"], "processing_class": names["tokenizer"]}
    other = trl.SFTTrainer(theirs, names["args"], **options)
    other.train()
    torch.testing.assert_close(trained_losses(names["trainer"]), trained_losses(other), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # importing trl takes a second or more
def test_trl_grpo() -> None:
    utils = pytest.importorskip("trl.trainer.utils", reason=REASON)
    found = run("TRL: log-probabilities and entropy for GRPO", {})["log_probabilities_and_entropy"]
    logits = (3 * torch.randn(2, 7, 31)).requires_grad_()
    tokens = torch.randint(31, (2, 7))
    results = [f(logits, tokens, temperature=0.7) for f in (found, utils.selective_log_softmax_and_entropy)]
    torch.testing.assert_close(*results)
    upstream = torch.randn(2, 2, 7).unbind()
    torch.testing.assert_close(*[torch.autograd.grad(result, logits, upstream) for result in results])

    # what GRPOTrainer has its model return, for the tokens that are not masked out
    model, batch = language_model(), torch.utils.data.default_collate(sentences())
    tokens = batch["labels"][:, 1:]
    ours = found(model(input_ids=batch["input_ids"]).logits[:, :-1], tokens, temperature=0.7)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    theirs = model(**batch, fused_lm_head=True)
    for mine, other in zip(ours, (theirs.log_probs, theirs.entropy), strict=True):
        torch.testing.assert_close(mine[tokens != -100], other[:, -tokens.shape[1] :][tokens != -100])


def test_accelerate(counted: list[Names]) -> None:
    state = pytest.importorskip("accelerate.state", reason=REASON)
    names = classifier() | {"batches": loader()}
    expected = by_hand(names, nn.CrossEntropyLoss(), accumulated=2)
    state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run("accelerate", names)
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    assert len(counted) == 4
    torch.testing.assert_close(weights(names), expected)


@lightnings_warnings
def test_lightning(counted: list[Names]) -> None:
    class Classifier(pytest.importorskip("lightning", reason=REASON).LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run("Lightning", {"module": Classifier(), "batches": loader()})
    assert len(counted) == 4


def test_timm(counted: list[Names]) -> None:
    pytest.importorskip("timm", reason=REASON)
    names = classifier()
    run("timm", names | {"batches": [(names["x"].view(-1, 1, 8, 8), names["y"])] * 2})
    assert len(counted) == 2


@pytest.mark.slow  # importing fastai takes two seconds
@pytest.mark.filterwarnings("ignore")  # fastai's own
def test_fastai() -> None:
    core = pytest.importorskip("fastai.data.core", reason=REASON)
    torch_core = pytest.importorskip("fastai.torch_core", reason=REASON)
    losses = pytest.importorskip("fastai.losses", reason=REASON)
    learner = pytest.importorskip("fastai.learner", reason=REASON)
    found = []
    for ours in (True, False):
        names = classifier() | {"dls": core.DataLoaders(loader(), loader())}
        if ours:
            made = run("fastai", names)["learner"]
        else:
            made = learner.Learner(names["dls"], names["model"], loss_func=losses.CrossEntropyLossFlat())
            made.fit(1)
        found.append((weights(names), made.recorder.values))
    torch.testing.assert_close(found[0][0], found[1][0])
    logits, y = torch.randn(4, 10, requires_grad=True), torch.arange(4)
    loss = run("fastai", classifier() | {"dls": core.DataLoaders(loader(), loader())})["loss_func"](
        torch_core.TensorBase(logits), torch_core.TensorCategory(y)
    )
    assert type(loss) is Tensor
    torch.testing.assert_close(loss, F.cross_entropy(logits, y))
    assert [*found[0][1][0]] == pytest.approx([*found[1][1][0]])


@pytest.mark.filterwarnings("ignore:The least populated class:UserWarning:sklearn")
def test_skorch(counted: list[Names]) -> None:
    skorch = pytest.importorskip("skorch", reason=REASON)
    names = run("skorch", classifier())
    assert counted
    assert torch.tensor(names["probabilities"]).sum(1).allclose(torch.ones(64))
    options = {"max_epochs": 2, "lr": 0.1, "verbose": 0}
    other = skorch.NeuralNetClassifier(classifier()["model"], criterion=nn.CrossEntropyLoss, **options)
    other.fit(names["x"], names["y"])
    assert names["net"].history[:, "train_loss"] == pytest.approx(other.history[:, "train_loss"])


def test_segmentation() -> None:
    pytest.importorskip("torchvision", reason="the extra train is not installed")
    masks = torch.randint(21, (2, 32, 48))
    masks[:, :5] = 255
    names = run("Segmentation with torchvision", {"images": torch.randn(2, 3, 32, 48), "masks": masks})
    model = names["model"]
    grads = [parameter.grad for parameter in model.parameters()]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logits = model(names["images"])["out"]
    expected = nn.CrossEntropyLoss(ignore_index=255)(logits, masks)
    torch.testing.assert_close(names["criterion"](logits, masks), expected)
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_gradients_of_each_sample() -> None:
    names = run("Gradients of each sample with torch.func", classifier())
    for i in (0, 63):
        loss = F.cross_entropy(names["model"](names["x"][i : i + 1]), names["y"][i : i + 1])
        expected = torch.autograd.grad(loss, list(names["model"].parameters()))
        torch.testing.assert_close([grads[i] for grads in names["gradients"].values()], list(expected))


@pytest.mark.filterwarnings("ignore::UserWarning:opacus", "ignore:Full backward hook is firing")
def test_opacus(counted: list[Names]) -> None:
    pytest.importorskip("opacus", reason=REASON)
    names = run("Opacus", classifier() | {"batches": loader()})
    assert counted
    x, y = digits()
    parameters = list(names["model"].parameters())
    found = []
    for criterion in (names["criterion"], nn.CrossEntropyLoss()):
        names["optimizer"].zero_grad()
        criterion(names["model"](x), y).backward()
        found.append([parameter.grad_sample.clone() for parameter in parameters])
    torch.testing.assert_close(*found)


def test_torch_export() -> None:
    names = run("torch.export", classifier())
    assert not [node for node in names["program"].graph.nodes if "softmax_fused" in str(node.target)]
    logits = names["model"](names["x"])
    expected = F.cross_entropy(logits, names["y"], label_smoothing=0.1)
    torch.testing.assert_close((names["logits"], names["loss"]), (logits, expected))


@pytest.mark.slow  # the exporter's first call takes several seconds
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason=REASON)
    onnx = pytest.importorskip("onnx", reason=REASON)
    reference = pytest.importorskip("onnx.reference", reason=REASON)
    names = run("ONNX", classifier())
    assert "Softmax" in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    (found,) = reference.ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"x": names["x"].numpy()})
    torch.testing.assert_close(torch.tensor(found), names["model"](names["x"]).softmax(1).detach())
