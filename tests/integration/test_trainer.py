"""The `Trainer` of transformers that distils from a cache: as the plain loop, resumed, and refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import logitcache
from logitcache import losses
from logitcache.catalog.calling import logits_of
from logitcache.data.batching import collate, pad
from logitcache.data.packing import pack
from logitcache.data.sequences import position_index
from logitcache.data.tokens import TokenDataset
from logitcache.errors import IdentityMismatch, IncompleteCache, LogitCacheError, SampleMismatch, UsageError
from tests.models import Pictures
from tests.needs import need_package
from tests.texts import BYTE_VOCABULARY, VOCABULARY, Texts, bert, byte_tokenizer, sentences, vit

BLEND = losses.Blend(alpha=0.7, temperature=2.0)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    need_package("transformers", "hf")
    import transformers

    transformers.utils.logging.disable_progress_bar()


def settings(folder: Path, **changes: Any) -> Any:
    """Arguments of a Trainer that does what a plain loop with AdamW does."""
    from transformers import TrainingArguments

    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "adamw_torch", "weight_decay": 0.0}
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    size = {"per_device_train_batch_size": 16, "num_train_epochs": 3, "learning_rate": 0.01, "seed": 5}
    return TrainingArguments(str(folder / "trainer"), **plain | quiet | size | changes)


def trainer(model: nn.Module, folder: Path, dataset: Any, cache: Any, arguments: Any = None, **options: Any) -> Any:
    from logitcache.integrations.huggingface import DistillationTrainer

    arguments = settings(folder) if arguments is None else arguments
    return DistillationTrainer(model, arguments, train_dataset=dataset, cache=cache, **options)


def plan() -> logitcache.ViewPlan:
    return logitcache.ViewPlan(transform=v2.RandomAffine(10, translate=(0.1, 0.1)), seed=1)


def write(
    path: Path, dataset: Any, plan: logitcache.ViewPlan, num_classes: int, num_views: int = 1, **about: Any
) -> Any:
    """A cache of random logits over a dataset, with the hashes of samples and inputs."""
    samples = logitcache.sample_table(dataset, contents=True)
    rows = getattr(dataset, "rows_per_sample", None)
    about |= {"encoding": about.get("encoding", logitcache.Dense(dtype="float32"))}
    writer = logitcache.create(
        path,
        num_samples=len(dataset),
        num_classes=num_classes,
        num_views=num_views,
        teacher="random",
        samples=samples,
        view_plan=plan,
        rows_per_sample=rows,
        tokenization=getattr(dataset, "tokenization", None),
        **about,
    )
    views = logitcache.ViewDataset(dataset, replace(plan, rows=writer.row_map))
    draw = torch.Generator().manual_seed(0)
    with writer:
        for view in range(num_views):
            logits = 3 * torch.randn(writer.row_map.num_rows, num_classes, generator=draw)
            writer.write(view=view, start=0, logits=logits, input_digests=views.input_digests(view))
    return logitcache.open(path)


@pytest.fixture(name="pictures", scope="module")
def _pictures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of three views of forty digits with keys."""
    return write(tmp_path_factory.mktemp("pictures") / "c.cache", Pictures(), plan(), 10, num_views=3)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def plain_loop(model: nn.Module, views: Any, step: Callable[..., torch.Tensor], epochs: int = 3) -> nn.Module:
    """The loop of the README; `step` gives the loss of a batch. The seed is for dropout, as in the Trainer."""
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    sampler = logitcache.ViewSampler(views, seed=5)
    function = pad if views.plan.collate is None and isinstance(views[0][1], dict) else views.plan.collate
    loader = DataLoader(views, 16, sampler=sampler, collate_fn=lambda samples: collate(samples, function))
    model.train()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for index, inputs, labels in loader:
            optimizer.zero_grad()
            step(model, index, inputs, labels).backward()
            optimizer.step()
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_a_trainer_gives_the_weights_of_the_plain_loop(pictures: Any, tmp_path: Path) -> None:
    """Bit for bit, with three views and the true labels blended in; some batches are smaller."""
    student = seeded(lambda: vit(10))
    run = trainer(student, tmp_path, Pictures(), pictures, plan=plan(), loss=BLEND)
    run.train()
    pictures.check_plan(of_loop := plan())

    def step(model: nn.Module, index: Any, inputs: Any, labels: Any) -> torch.Tensor:
        return BLEND(logits_of(model(inputs)), pictures.logits(index), labels).mean()

    expected = plain_loop(seeded(lambda: vit(10)), logitcache.ViewDataset(Pictures(), of_loop), step)

    assert not same_weights(student, seeded(lambda: vit(10)))
    assert same_weights(expected, student)


@pytest.mark.parametrize("last", [2, 3, 5], ids=["within an epoch", "at its end", "within another view"])
def test_a_trainer_that_resumes_gives_the_weights_of_an_uninterrupted_one(
    pictures: Any, tmp_path: Path, last: int
) -> None:
    """Three steps per epoch; each epoch has another view. The model has dropout."""
    arguments = settings(tmp_path, save_strategy="steps", save_steps=1)
    whole, resumed = (
        trainer(seeded(dropping), tmp_path, Pictures(), pictures, arguments, plan=plan(), loss=BLEND) for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"trainer/checkpoint-{last}"))

    assert 9 == resumed.state.global_step
    assert same_weights(whole.model, resumed.model)


def test_the_best_weights_and_those_of_another_model(pictures: Any, tmp_path: Path) -> None:
    """transformers saves the layers of ViT under other names than those of the model."""
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    arguments = settings(tmp_path, **steps, load_best_model_at_end=True, learning_rate=0.1)
    run = trainer(seeded(dropping), tmp_path, Pictures(), pictures, arguments, plan=plan(), eval_dataset=drawn())
    run.train()
    best = type(run.model).from_pretrained(run.state.best_model_checkpoint)

    assert same_weights(best, run.model)
    with pytest.raises(UsageError, match="are those of another model: missing are"):
        other = trainer(vit(10, layers=2), tmp_path, Pictures(), pictures, arguments, plan=plan(), eval_dataset=drawn())
        other.train(resume_from_checkpoint=str(tmp_path / "trainer/checkpoint-2"))


def drawn() -> Any:
    """Digits that are not in the cache, without keys."""
    return drawn_from(Pictures(60))[40:]


def dropping() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "intermediate_size": 32}
    config = ViTConfig(**size, num_hidden_layers=1, num_attention_heads=2, num_labels=10, hidden_dropout_prob=0.3)
    return ViTForImageClassification(config)


def test_workers_that_persist_and_accumulation_change_no_view(pictures: Any, tmp_path: Path) -> None:
    """Two micro-batches of eight are one batch of sixteen, up to rounding."""
    arguments = settings(
        tmp_path,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
    )
    whole = trainer(seeded(lambda: vit(10)), tmp_path, Pictures(), pictures, plan=plan())
    parts = trainer(seeded(lambda: vit(10)), tmp_path, Pictures(), pictures, arguments, plan=plan())
    whole.train()
    parts.train()

    theirs = parts.model.state_dict()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(theirs[name], value, atol=1e-3, rtol=1e-3)


class Negative(Pictures):
    """The same keys and labels with other images."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return ImageOps.invert(image), label


def test_one_changed_sample_is_refused_when_it_is_loaded(pictures: Any, tmp_path: Path) -> None:
    with pytest.raises(SampleMismatch, match=r"sample 3 \(scan/0003.png\) is not what the teacher saw"):
        trainer(vit(10), tmp_path, Pictures(repaint=3), pictures, plan=plan()).train()


def drawn_from(dataset: Any) -> Any:
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize(
    ("dataset", "changes", "error", "message"),
    [
        (Pictures(), {"seed": 2}, IdentityMismatch, "view_seed: 1 in the cache, 2 here"),
        (Pictures(), {"transform": v2.RandomAffine(11)}, IdentityMismatch, "transform.shared"),
        (Pictures(), {"transform": None}, IdentityMismatch, "transform.shared"),
        (Pictures(relabel=3), {}, SampleMismatch, r"sample 3 \(scan/0003.png\) has the target"),
        (Pictures(44), {}, SampleMismatch, "sample 'scan/0040.png' is not in the cache"),
        (Negative(), {}, SampleMismatch, r"sample .* \(scan/00...png\) is not what the teacher saw"),
        (drawn_from(Pictures()), {}, SampleMismatch, "sample '0' is not in the cache"),
    ],
    ids=["view seed", "transform", "no transform", "label", "more samples", "images", "no keys"],
)
def test_other_views_and_samples_are_refused_before_the_first_step(
    pictures: Any, tmp_path: Path, dataset: Any, changes: Any, error: type[Exception], message: str
) -> None:
    student = seeded(lambda: vit(10))

    with pytest.raises(error, match=message):
        trainer(student, tmp_path, dataset, pictures, plan=replace(plan(), **changes)).train()

    assert same_weights(student, seeded(lambda: vit(10)))


def test_a_transform_that_renders_other_pixels_is_refused_before_the_first_step(tmp_path: Path) -> None:
    cache = write(tmp_path / "c.cache", Pictures(), logitcache.ViewPlan(preprocess=rendering(1.0)), 10)
    student = seeded(lambda: vit(10))

    with pytest.raises(IdentityMismatch, match="view 0 of sample .* is not what the teacher saw"):
        trainer(student, tmp_path, Pictures(), cache, plan=logitcache.ViewPlan(preprocess=rendering(0.5))).train()

    assert same_weights(student, seeded(lambda: vit(10)))


FACTOR = 1.0


def scale(image: torch.Tensor) -> torch.Tensor:
    return image * FACTOR


def rendering(factor: float) -> Callable[..., Any]:
    """The same function by name, which does something else: as with another version of a library."""
    global FACTOR
    FACTOR = factor
    return scale


def test_an_open_cache_and_a_head_of_another_size_are_refused(pictures: Any, tmp_path: Path) -> None:
    logitcache.create(
        tmp_path / "open.cache", num_samples=40, num_classes=10, teacher="t", dataset="d", view_plan=plan()
    ).close()

    with pytest.raises(IncompleteCache, match=r"open.cache is not sealed yet"):
        trainer(vit(10), tmp_path, Pictures(), logitcache.open(tmp_path / "open.cache"), plan=plan())
    with pytest.raises(UsageError, match="the model has 2 classes, the cache 10; create the model with num_labels=10"):
        trainer(vit(2), tmp_path, Pictures(), pictures, plan=plan()).train()
    with pytest.raises(UsageError, match="train_sampling_strategy is 'group_by_length'; expected 'random' or"):
        arguments = settings(tmp_path, train_sampling_strategy="group_by_length")
        trainer(vit(10), tmp_path, Pictures(), pictures, arguments, plan=plan())
    with pytest.raises(UsageError, match="label_smoothing_factor and compute_loss_func have no effect on the loss"):
        smoothed = settings(tmp_path, label_smoothing_factor=0.1)
        trainer(vit(10), tmp_path, Pictures(), pictures, smoothed, plan=plan())
    with pytest.raises(UsageError, match="label_smoothing_factor and compute_loss_func have no effect on the loss"):
        trainer(nn.Linear(3, 10), tmp_path, Pictures(), pictures, smoothed, plan=plan())


def test_a_part_in_another_order_is_matched_by_key(pictures: Any, tmp_path: Path) -> None:
    order = [17, 3, 25, 9]
    run = trainer(vit(10), tmp_path, Pictures(order=order), pictures, plan=plan())
    [batch] = run.get_train_dataloader()

    assert sorted(order) == sorted(logitcache.split_index(batch["index"])[1].tolist())
    run.train()


def test_an_evaluation_uses_the_labels_and_no_augmentation(pictures: Any, tmp_path: Path) -> None:
    test = drawn()
    run = trainer(seeded(lambda: vit(10)), tmp_path, Pictures(), pictures, plan=plan(), eval_dataset=test)
    images = torch.stack([v2.functional.to_image(image).float() / 255 for image, _ in test])
    labels = torch.tensor([label for _, label in test])
    with torch.no_grad():
        expected = nn.functional.cross_entropy(run.model.eval()(images).logits, labels)

    assert run.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-4)
    assert (20, 10) == run.predict(test).predictions.shape


def texts_with_ids() -> Any:
    """Texts with an identity of their tokens."""
    texts = Texts(36, "tensors")
    texts.tokenization = {"tokenizer": "words", "sha256": "0" * 64}  # type: ignore[attr-defined]
    return texts


def test_a_classifier_of_texts_has_the_weights_of_the_plain_loop(tmp_path: Path) -> None:
    cache = write(tmp_path / "c.cache", texts_with_ids(), logitcache.ViewPlan(), 3)
    student = seeded(lambda: bert(3, layers=1))
    trainer(student, tmp_path, texts_with_ids(), cache, loss=BLEND).train()

    def step(model: nn.Module, index: Any, inputs: Any, labels: Any) -> torch.Tensor:
        return BLEND(model(**inputs).logits, cache.logits(index), labels).mean()

    views = logitcache.ViewDataset(texts_with_ids(), cache.view_plan)

    assert same_weights(plain_loop(seeded(lambda: bert(3, layers=1)), views, step), student)


def test_padding_has_the_id_that_the_model_expects(tmp_path: Path) -> None:
    """Some classifiers of transformers find the last token by it."""
    cache = write(tmp_path / "c.cache", texts_with_ids(), logitcache.ViewPlan(), 3)
    model = bert(3, layers=1)
    model.config.pad_token_id = 1  # type: ignore[union-attr]
    batch = next(iter(trainer(model, tmp_path, texts_with_ids(), cache).get_train_dataloader()))

    assert {1} == set(batch["input_ids"][batch["attention_mask"] == 0].tolist())


def llama(layers: int = 1) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=None, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config)


@pytest.fixture(name="tokens", scope="module")
def _tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    need_package("transformers", "hf")
    path = tmp_path_factory.mktemp("tokens") / "c.cache"
    return write(path, sentences()["train"], logitcache.ViewPlan(), VOCABULARY, encoding=logitcache.TopK(k=6))


def test_a_language_model_has_the_weights_of_the_plain_loop(tokens: Any, tmp_path: Path) -> None:
    """Bit for bit: the loss of a batch is the sum over its rows, divided by their number."""
    student = seeded(llama)
    trainer(student, tmp_path, sentences()["train"], tokens, loss=BLEND).train()

    def step(model: nn.Module, index: Any, inputs: Any, labels: Any) -> torch.Tensor:
        at = position_index(index, tokens.row_map, inputs["input_ids"].shape[1])
        targets = tokens.view(0).targets(at[at >= 0])
        truth = inputs["input_ids"].roll(-1, dims=1)[at >= 0]
        return BLEND(model(**inputs).logits[at >= 0], targets, truth).mean()

    views = logitcache.ViewDataset(sentences()["train"], tokens.view_plan)

    assert same_weights(plain_loop(seeded(llama), views, step), student)


def test_a_batch_without_rows_has_no_loss(tokens: Any, tmp_path: Path) -> None:
    """A sequence of one token predicts nothing."""
    arguments = settings(tmp_path, per_device_train_batch_size=1, num_train_epochs=1)
    student = seeded(llama)
    trainer(student, tmp_path, sentences()["train"], tokens, arguments, loss=BLEND).train()

    assert 1 in sentences()["train"].lengths
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())


def test_packed_batches_have_the_loss_of_padded_ones(tokens: Any, tmp_path: Path) -> None:
    first: dict[str, float] = {}
    for name, function in (("padded", None), ("packed", pack)):
        plan = replace(tokens.view_plan, collate=function)
        run = trainer(seeded(llama), tmp_path, sentences()["train"], tokens, plan=plan, loss=BLEND)
        batches = iter(run.get_train_dataloader())
        run.model.train()
        first[name] = run.compute_loss(run.model, next(batches)).item()

    assert first["packed"] == pytest.approx(first["padded"], rel=1e-5)


def test_the_loss_of_an_evaluation_is_the_nll_of_the_true_tokens(tokens: Any, tmp_path: Path) -> None:
    test = sentences()["test"]
    run = trainer(seeded(llama), tmp_path, sentences()["train"], tokens, eval_dataset=test)
    run.args.per_device_eval_batch_size = 4
    nll = []
    with torch.no_grad():
        for number in range(len(test)):
            ids = test[number][0]["input_ids"]
            logits = run.model.eval()(input_ids=ids[None]).logits[0, :-1]
            nll += nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()

    assert run.evaluate()["eval_loss"] == pytest.approx(float(np.mean(nll)), abs=1e-4)


def changed(tokens: TokenDataset, **changes: Any) -> TokenDataset:
    parts = {"keys": tokens.keys, "task": tokens.task, "vocab_size": VOCABULARY, "tokenization": tokens.tokenization}
    sequences = changes.pop("sequences", [tokens.ids(number) for number in range(len(tokens))])
    return TokenDataset(sequences, **parts | changes)


def test_another_tokenizer_or_token_is_refused_before_the_first_step(tokens: Any, tmp_path: Path) -> None:
    train = sentences()["train"]
    sequences = [train.ids(number).copy() for number in range(len(train))]
    sequences[7][0] ^= 1
    shorter = [sequences[0][:-1], *sequences[1:]]
    others: list[tuple[TokenDataset, str]] = [
        (changed(train, tokenization={"task": "causal", "vocab_size": 9}), "tokenization.vocab_size: 24 in the cache"),
        (changed(train, sequences=sequences), r"sample 7 \(0/7\) has other tokens"),
        (changed(train, sequences=shorter), r"sample 0 \(0/0\) has 10 rows, 9 here"),
    ]

    for dataset, message in others:
        with pytest.raises(IdentityMismatch, match=message):
            trainer(llama(), tmp_path, dataset, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "text.cache"}, r"cache is 'text.cache'; expected an open cache, logitcache.open\(PATH\)"),
        ({"loss": "kl"}, r"loss is 'kl'; expected a loss object, such as logitcache.losses.KLDivergence"),
        ({"loss": logitcache.losses.kl_divergence}, "loss is <function kl_divergence .*; expected a loss object"),
        ({"dataset": None}, "train_dataset is missing; expected the dataset of stage 1"),
        ({"dataset": [{"input_ids": [1, 2]}]}, "items of train_dataset are mappings with input_ids; expected pairs"),
        ({"dataset": iter([])}, "without a length; expected a map-style dataset"),
    ],
)
def test_arguments_of_another_kind_are_refused(
    tokens: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arguments = {"dataset": sentences()["train"], "cache": tokens} | changes

    with pytest.raises(UsageError, match=message):
        trainer(llama(), tmp_path, **arguments)


def test_a_cache_without_a_recorded_plan_takes_no_augmentation(tmp_path: Path) -> None:
    with logitcache.create(tmp_path / "c.cache", num_samples=40, num_classes=10, teacher="t", dataset="d") as writer:
        writer.write(view=0, start=0, logits=torch.randn(40, 10))
    cache = logitcache.open(tmp_path / "c.cache")

    with pytest.raises(
        UsageError, match="was created without `view_plan`, so the views of this plan can't be compared"
    ):
        trainer(vit(10), tmp_path, Pictures(), cache, plan=replace(plan(), seed=0))
    with pytest.raises(UsageError, match="was created without `view_plan`, so its views can't be rendered from it"):
        trainer(vit(10), tmp_path, Pictures(), cache)
    trainer(vit(10), tmp_path, Pictures(), cache, plan=logitcache.ViewPlan()).train()


def test_trl_trains_the_same_language_model(tokens: Any, tmp_path: Path) -> None:
    need_package("trl", "trl")
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig

    from logitcache.integrations.trl import DistillationSFTTrainer

    student, own = seeded(llama), seeded(llama)
    trainer(student, tmp_path, sentences()["train"], tokens, loss=BLEND).train()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(byte_tokenizer(tmp_path / "t.json")), pad_token="<pad>")
    known = settings(tmp_path).to_dict()
    common = ("lr_scheduler_type", "max_grad_norm", "optim", "weight_decay", "report_to", "disable_tqdm", "seed")
    common += ("dataloader_pin_memory", "save_strategy", "per_device_train_batch_size", "num_train_epochs")
    shared = {name: known[name] for name in common} | {"learning_rate": 0.01, "output_dir": str(tmp_path / "sft")}
    arguments = SFTConfig(**shared, bf16=False, activation_checkpointing=False)
    data = {"train_dataset": sentences()["train"], "cache": tokens, "processing_class": tokenizer}
    DistillationSFTTrainer(own, arguments, **data, loss=BLEND).train()

    assert same_weights(student, own)

    with pytest.raises(UsageError, match="packing and padding_free form sequences that the cache doesn't have"):
        packed = SFTConfig(
            **shared, bf16=False, activation_checkpointing=False, packing=True, packing_strategy="wrapped"
        )
        DistillationSFTTrainer(llama(), packed, **data)


def test_columns_of_a_hugging_face_dataset_are_samples_with_keys(tmp_path: Path) -> None:
    import wave

    from datasets import Audio, ClassLabel, Dataset, Features, Image, Value
    from transformers import PreTrainedTokenizerFast

    from logitcache.integrations.huggingface import audio_dataset, image_dataset, text_dataset

    sounds = []
    for number in range(2):
        sounds.append(str(tmp_path / f"{number}.wav"))
        with wave.open(sounds[-1], "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(np.full(40, 1000 * (number + 1), dtype="<i2").tobytes())
    names = ClassLabel(names=["two", "one"])
    features = {"image": Image(), "audio": Audio(), "text": Value("string"), "label": names, "id": Value("string")}
    columns = {
        "image": [Pictures(2)[number][0] for number in range(2)],
        "audio": sounds,
        "text": ["ab", "cde"],
        "label": [0, 1],
        "id": ["first", "second"],
    }
    split = Dataset.from_dict(columns).cast(Features(features))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(byte_tokenizer(tmp_path / "t.json")), pad_token="<pad>")
    images = image_dataset(split, key="id")
    clips = audio_dataset(split, sample_rate=8000, num_samples=50, key="id")
    texts = text_dataset(split, tokenizer, key="id")
    classes = text_dataset(split, tokenizer, task="classification", key="id", max_length=2)

    assert [("first", "second")] * 3 == [tuple(each.keys) for each in (images, clips, texts)]  # type: ignore[attr-defined]
    assert ((8, 8), 1) == (images[1][0].size, images[1][1])
    assert [1000 / 2**15] * 40 + [0.0] * 10 == clips[0][0].tolist()
    assert [[1], [1, 1]] == [[1] * int(rows) for rows in texts.rows_per_sample]
    assert (["two", "one"], [0, 1], [2, 2]) == (classes.class_names, classes.targets.tolist(), classes.lengths.tolist())
    assert 64 == len(texts.tokenization["sha256"])
    with pytest.raises(UsageError, match="unknown column 'txt'"):
        text_dataset(split, tokenizer, field="txt")
    with pytest.raises(UsageError, match=r"a mapping with train, test; choose one .* text_dataset\(splits\['train'\]"):
        text_dataset({"train": split, "test": split}, tokenizer)
    assert issubclass(UsageError, LogitCacheError)


GUIDE = (Path(__file__).parents[2] / "docs/integrations.md").read_text()


def program(heading: str) -> str:
    """The Python of a section of the guide, before its subsections."""
    section = re.split(r"^##+ ", GUIDE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL))


def test_the_programs_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 of texts and of classes, then a Trainer on each cache, and one on images."""
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from transformers import PreTrainedTokenizerFast

    from logitcache.integrations.huggingface import DistillationTrainer, image_dataset, text_dataset

    monkeypatch.chdir(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(byte_tokenizer(tmp_path / "t.json")), pad_token="<pad>")
    texts = ["one", "three", "eleven"] * 4
    features = Features({"text": Value("string"), "label": ClassLabel(names=["b", "a"])})
    split = {"train": Dataset.from_dict({"text": texts, "label": [0, 1] * 6}, features=features)}
    known: dict[str, Any] = {"split": split, "tokenizer": tokenizer, "torch": torch, "DataLoader": DataLoader}
    known |= {"text_dataset": text_dataset, "logitcache": logitcache, "training_arguments": settings(tmp_path)}

    def model(kind: str, **sizes: int) -> nn.Module:
        import transformers

        common = {"vocab_size": BYTE_VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.AutoConfig.for_model(kind, intermediate_size=32, pad_token_id=0, **common, **sizes)
        head = "CausalLM" if kind == "llama" else "SequenceClassification"
        return getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()

    for heading, path, kind, sizes in [
        ("Causal language models", "text.cache", "llama", {"bos_token_id": 1, "eos_token_id": 2}),
        ("Sequence classification", "classes.cache", "bert", {"num_labels": 2}),
    ]:
        exec(program(heading), known | {"teacher": model(kind, **sizes)}, found := {})  # type: ignore[arg-type]
        cache = logitcache.open(path)
        run = DistillationTrainer(model(kind, **sizes), settings(tmp_path), train_dataset=found["train"], cache=cache)
        assert run.train().metrics["train_loss"] > 0

    with pytest.raises(UsageError, match="the training data has the columns text, label; expected items"):
        DistillationTrainer(model("bert"), settings(tmp_path), train_dataset=split["train"], cache=cache)

    pictures = {"image": [image for image, _ in drawn()], "label": [label for _, label in drawn()]}
    pictures |= {"id": [str(number) for number in range(20)]}
    images = Dataset.from_dict(pictures).cast_column("image", Image())
    write(tmp_path / "mine.cache", image_dataset(images, key="id"), plan(), 10)
    student = seeded(lambda: vit(10))
    student.vit.embeddings.patch_embeddings.projection = nn.Conv2d(3, 16, 4, stride=4)  # type: ignore[union-attr]
    student.vit.embeddings.patch_embeddings.num_channels = 3  # type: ignore[union-attr]
    names = known | {"split": {"train": images, "test": images}, "student": student, "plan": plan()}
    exec(program("Hugging Face Trainer"), names)

    assert 6 == names["trainer"].state.global_step
