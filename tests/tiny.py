"""Models and data small enough to train in a second, built without a download."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REASON = "the extra integrations is not installed"

lightnings_warnings = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",  # its use of torch's pytree
    "ignore:The .*dataloader.* does not have many workers",
    "ignore:The number of training batches",
)


def kernels_package() -> ModuleType:
    """Hugging Face's kernels. Without it, its name leads to this repository's folder."""
    pytest.importorskip("kernels.layer", reason=REASON)
    return importlib.import_module("kernels")


def language_model() -> nn.Module:
    """A Llama of two layers, from its configuration."""
    transformers = pytest.importorskip("transformers", reason=REASON)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def sentences() -> list[dict[str, Tensor]]:
    """Tokens, and labels of which the first three are ignored."""
    tokens = torch.randint(97, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :3] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def digits() -> tuple[Tensor, Tensor]:
    """A batch of 64 of scikit-learn's digits, 8 x 8."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the extra train is not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images[:64] / 16, dtype=torch.float32), torch.tensor(labels[:64])


def tokenizer() -> Any:
    """A tokenizer of 97 words, the last three of which are special."""
    tokenizers = pytest.importorskip("tokenizers", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    words = {f"w{i}": i for i in range(94)} | {"<unk>": 94, "<pad>": 95, "<eos>": 96}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def trained_losses(trainer: Any) -> Tensor:
    """The losses that transformers' Trainer, or one built on it, has logged."""
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@contextlib.contextmanager
def unregistered(layer: type[nn.Module]) -> Iterator[None]:
    """Take back afterwards what kernels.replace_kernel_forward_from_hub writes into a class."""
    try:
        yield
    finally:
        for name in ("kernel_layer_name", "kernel_condition"):
            if name in vars(layer):
                delattr(layer, name)
