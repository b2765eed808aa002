"""Models of Hugging Face's `transformers` from a configuration, a local folder or a GGUF file, without downloads."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitcache.catalog.calling import model_logits
from logitcache.catalog.tokenization import gguf_digest, need_package
from logitcache.data.packing import pack
from logitcache.data.tokens import CAUSAL, CLASSIFICATION, MASKED, TASKS
from logitcache.errors import DatasetUnavailable, UsageError
from logitcache.registry import unknown_name

# B batch, L length, D hidden size, C classes

_CLASSES = {
    CAUSAL: "AutoModelForCausalLM",
    MASKED: "AutoModelForMaskedLM",
    CLASSIFICATION: "AutoModelForSequenceClassification",
}


class Head(nn.Linear):
    """The output layer of a language model, which `without_head` turns off."""

    bypassed = False

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, float (B, L, C); the hidden states themselves where the layer is bypassed."""
        return hidden if self.bypassed else super().forward(hidden)


def transformers_model(
    num_classes: int,
    tokenization: Mapping[str, Any] | None = None,
    *,
    path: str | None = None,
    config: Mapping[str, Any] | str | None = None,
    task: str | None = None,
    attention: str | None = None,
) -> nn.Module:
    """A model of `transformers` for the data's task, in float32.

    Args:
        num_classes: C. In a language model the number of token ids: a larger vocabulary of `path` is cut to it.
        tokenization: of the dataset `text`.
        path: a folder or a `.gguf` file with weights.
        config: a mapping with `model_type`, or a folder or file with `config.json`, for random weights.
        task: "causal", "masked" or "classification"; by default that of the data.
        attention: implementation of attention: "eager", "sdpa", "flash_attention_2"; by default the library's choice.

    Raises:
        DatasetUnavailable: the package, the folder or the file is missing.
        UsageError: an invalid option, a smaller vocabulary than the data's, or missing weights.
    """
    task = _checked_task(task, tokenization)
    if (path is None) == (config is None):
        raise UsageError("set either `path`, for a model with its weights, or `config`, for random weights")
    transformers = need_package("transformers", "has the model")
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    automatic = getattr(transformers, _CLASSES[task])
    if path is None:
        assert config is not None
        settings = _configuration(transformers, config, task, num_classes, tokenization)
        model = automatic.from_config(settings, **options)
        model.untrained = []
    else:
        if task == CLASSIFICATION:
            options["num_labels"] = num_classes
        model = _pretrained(transformers, automatic, Path(path), options)
    model.config.use_cache = False
    built: nn.Module = model
    if task == CLASSIFICATION:
        return built
    if path is not None:
        _refuse_untrained(model, path)
        _fit_vocabulary(model, num_classes)
    return built


def identifying_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `transformers` model without the place of its files, but with their configuration."""
    stated = {name: value for name, value in args.items() if name not in ("path", "attention")}
    path = args.get("path")
    if path is not None:
        gguf = Path(path).suffix == ".gguf"
        config = Path(path) / "config.json"
        stated["source"] = gguf_digest(Path(path), "") if gguf else hashlib.sha256(config.read_bytes()).hexdigest()
    return stated


@contextmanager
def without_head(model: nn.Module) -> Iterator[Head]:
    """Within, a language model returns hidden states (B, L, D) in the place of its logits; gives the head.

    The logits are then `hidden @ head.weight.T + head.bias`. `check_head` tells whether this holds for a model.

    Raises:
        UsageError: the model has no linear output layer.
    """
    head = head_of(model)
    head.bypassed = True
    try:
        yield head
    finally:
        head.bypassed = False


def head_of(model: nn.Module) -> Head:
    """The linear layer that gives a model's logits.

    It is what `get_output_embeddings()` returns, as in language models of `transformers`, or else the model's attribute
    `head`, an `nn.Linear`. It becomes a `Head`.

    Raises:
        UsageError: the model has no linear output layer.
    """
    given = getattr(model, "get_output_embeddings", lambda: getattr(model, "head", None))
    found = given()
    if type(found) is nn.Linear:
        found.__class__ = Head
    if not isinstance(found, Head):
        raise UsageError(
            f"{type(model).__name__} has no linear output layer over hidden states; use a causal or masked model of "
            "`transformers`, a model with an nn.Linear as its attribute `head`, or a loss that takes logits without "
            "`train.chunked_head`"
        )
    return found


def check_head(model: nn.Module, inputs: Any) -> None:
    """Check on a batch that the head is all that lies between hidden states and logits.

    Raises:
        UsageError: the model has no head, or changes its logits afterwards, as those with soft-capping do.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model_logits(model, inputs)
        with without_head(model) as head:
            hidden = model_logits(model, inputs)
        recomputed = F.linear(hidden, head.weight, head.bias)
    model.train(was_training)
    if logits.shape != recomputed.shape or not torch.allclose(logits, recomputed, atol=1e-4, rtol=1e-3):
        raise UsageError(
            f"{type(model).__name__} changes the logits after its output layer (by a scale or a cap), so they can't be "
            "computed by chunks; use a loss that takes logits"
        )


def num_cut_classes(model: nn.Module) -> int:
    """Classes that a head was cut by, such as those of a head that is padded beyond the tokenizer."""
    return len(model.cut_head[0]) if hasattr(model, "cut_head") else 0  # type: ignore[index]


@contextmanager
def watched_cut_classes(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within, each call of a model whose head was cut appends the probability of the cut classes, float32 (B, L).

    They are right for models that return the output of their head unchanged; see `check_head`.
    """
    weight, bias = model.cut_head  # type: ignore[misc]
    masses: list[Tensor] = []

    def watch(head: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> None:
        hidden = arguments[0].float()
        of_cut = F.linear(hidden, weight.to(hidden), None if bias is None else bias.to(hidden)).logsumexp(dim=-1)
        masses.append((of_cut - logits.float().logsumexp(dim=-1)).sigmoid())

    handle = head_of(model).register_forward_hook(watch)
    try:
        yield masses
    finally:
        handle.remove()


def check_packing(model: nn.Module, vocab_size: int) -> None:
    """Check that a model gives the same logits for sequences that are packed into one row as for each alone.

    Raises:
        UsageError: it attends to other sequences of the row, or takes no `position_ids`.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    sequences = [{"input_ids": torch.arange(length) % vocab_size} for length in (4, 3, 1)]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            together = model_logits(model, {name: ids.to(device) for name, ids in pack(sequences).items()})
            alone = model_logits(model, {"input_ids": sequences[1]["input_ids"][None].to(device)})
    except Exception as error:
        raise UsageError(f"{type(model).__name__} takes no packed batches: {error}; use data.collate=pad") from error
    finally:
        model.train(was_training)
    if together.ndim != 3 or not torch.allclose(together[1, :3], alone[0], atol=1e-4, rtol=1e-3):
        raise UsageError(
            f"{type(model).__name__} does not keep packed sequences apart; use data.collate=pad, or another "
            "implementation of `attention`"
        )


def _checked_task(task: str | None, tokenization: Mapping[str, Any] | None) -> str:
    of_data = None if tokenization is None else str(tokenization["task"])
    if task is None:
        if of_data is None:
            raise UsageError(f"set `task`: {', '.join(TASKS)}; only the dataset `text` states it")
        return of_data
    if task not in TASKS:
        raise UsageError(unknown_name("task", task, TASKS))
    if of_data not in (None, task):
        raise UsageError(f"the model's task is {task}, that of the data {of_data}; expected the same")
    return task


def _configuration(
    transformers: Any,
    config: Mapping[str, Any] | str,
    task: str,
    num_classes: int,
    tokenization: Mapping[str, Any] | None,
) -> Any:
    """A configuration with the sizes of the data."""
    sizes: dict[str, Any] = {}
    if task == CLASSIFICATION:
        sizes["num_labels"] = num_classes
    vocab_size = num_classes if task != CLASSIFICATION else (tokenization or {}).get("vocab_size")
    if vocab_size is not None:
        sizes["vocab_size"] = vocab_size
    if isinstance(config, str):
        file = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        if not file.is_file():
            raise DatasetUnavailable(f"the model's configuration {file} does not exist")
        return transformers.AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False, **sizes)
    if "model_type" not in config:
        raise UsageError("`config` must have `model_type`, such as llama, gpt2 or bert")
    for name, size in sizes.items():
        if config.get(name, size) != size:
            raise UsageError(f"`config` has {name} {config[name]}, the data {size}; leave it out")
    # The defaults of many models are ids beyond a small vocabulary.
    return transformers.AutoConfig.for_model(**{"bos_token_id": None, "eos_token_id": None, **config, **sizes})


def _pretrained(transformers: Any, automatic: Any, path: Path, options: dict[str, Any]) -> Any:
    if not path.exists():
        raise DatasetUnavailable(
            f"the model {path} does not exist; set `path` to a folder of transformers or a .gguf file"
        )
    folder = path
    if path.suffix == ".gguf":
        need_package("gguf", "reads .gguf files")
        need_package("accelerate", "loads models from .gguf files")
        folder, options = path.parent, {**options, "gguf_file": path.name}
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are errors of our own
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the progress bar of GGUF files can't be disabled
            model, found = automatic.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    finally:
        logging.set_verbosity(verbosity)
    model.untrained = sorted(found["missing_keys"])
    return model


def _refuse_untrained(model: Any, path: str) -> None:
    if model.untrained:
        raise UsageError(
            f"{path} has no weights for {', '.join(model.untrained[:3])} of {type(model).__name__} "
            f"({len(model.untrained)} in total); choose a model that was trained for the task"
        )


def _fit_vocabulary(model: Any, num_classes: int) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    if known < num_classes:
        raise UsageError(
            f"the model has {known} token ids, the data {num_classes}; use the tokenizer of the model, or vocab_size="
            f"{known} in data.args if its tokens beyond are not used"
        )
    if known > num_classes:
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            bias = None if head.bias is None else head.bias.detach()[num_classes:].clone()
            model.cut_head = head.weight.detach()[num_classes:].clone(), bias
        model.resize_token_embeddings(num_classes, mean_resizing=False)
