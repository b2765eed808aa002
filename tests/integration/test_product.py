"""A student that was exported: every number of it computed again by other means, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import rich.filesize
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file

import logitcache
from logitcache.catalog.nets import CNN
from logitcache.config.build import resolve_data
from logitcache.config.schema import Pipeline, load_pipeline
from logitcache.errors import CorruptCache, IdentityMismatch, InvalidLogits, StorageError, UsageError
from logitcache.extras.student_export import Exported, export_run, load_student
from logitcache.extras.student_export.cost import count_macs, median_seconds
from logitcache.extras.student_export.onnx_model import OnnxModel, compare_with_torch, quantise
from logitcache.randomness import keyed_permutation
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.stages.finished_student import Weights, open_student
from logitcache.stages.train_student import train_students
from logitcache.stages.train_teacher import train_teacher
from tests.commands import logitcache as command
from tests.commands import refused

Make = Callable[..., Pipeline]
NORMALISED = [{"Normalize": {"mean": [0.3], "std": [0.5]}}]
CONV = {
    "name": "conv",
    "model": "cnn",
    "args": {"widths": [16, 32]},
    "input": NORMALISED,
    "loss": {"name": "kl", "temperature": 2.0},
}
NASTY = "</script><script>alert(1)</script>\n---\n# [x](http://evil.example) ![y](z) `a` | b \u202e"


def exported(
    run: Path,
    out: Path | None = None,
    *,
    to: Literal["safetensors", "onnx"],
    int8: bool = False,
    weights: Weights = "last",
    data: Pipeline | None = None,
) -> Exported:
    return export_run(open_student(run, weights=weights, data=data), out, to=to, int8=int8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml, its cache, and runs of `conv` with two seeds, exported to everything but safetensors."""

    from logitcache import progress
    from logitcache.config.schema import parse_pipeline
    from tests.conftest import ALL_DIGITS, tiny_settings

    progress.silence()
    folder = tmp_path_factory.mktemp("product")
    raw = tiny_settings(folder, *ALL_DIGITS)
    raw["cache"]["card"] = {"license": "mit", "dataset": "uci/digits"}
    raw["teacher"] |= {"weights": "trained", "train": {"epochs": 3}}
    raw["train"]["seeds"] = [0, 1]
    raw["students"] = [CONV]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    pipeline = parse_pipeline(raw, source="tiny")
    train_teacher(pipeline)
    cache_teacher(pipeline)
    train_students(pipeline)
    exported(folder / "runs/conv/seed-0", to="onnx", int8=True)
    exported(folder / "runs/conv/seed-0", to="safetensors")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run of its own to export, not exported yet."""
    shutil.copytree(made / "runs/conv", tmp_path / "conv", ignore=shutil.ignore_patterns("product"))
    return tmp_path / "conv/seed-0"


def facts(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "product.json").read_text())
    return loaded


def form(folder: Path, name: str) -> dict[str, Any]:
    return next(variant for variant in facts(folder)["variants"] if variant["name"] == name)


def rendered(made: Path, split: str) -> tuple[torch.Tensor, np.ndarray]:
    """Inputs and targets of a split, by hand."""
    dataset = getattr(resolve_data(load_pipeline(made / "tiny.yaml"), trust=False), split)
    images, targets = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None].float().div_(255.0)
    return (pixels - 0.3) / 0.5, np.array(targets)


def conv(weights: Path) -> CNN:
    model = CNN((1, 8, 8), 10, (16, 32))
    model.load_state_dict(load_file(weights))
    return model.eval()


def through_onnx(path: Path, inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"input": inputs.numpy()})[0]
    return logits


# The numbers


@pytest.mark.parametrize("split", ["test", "validation"])
def test_accuracies_are_those_of_each_form(made: Path, split: str) -> None:
    product = made / "runs/conv/seed-0/product"
    inputs, targets = rendered(made, split)
    with torch.inference_mode():
        answers = {"torch": conv(product / "model.safetensors")(inputs).numpy()}
    answers["onnx"] = through_onnx(product / "model.onnx", inputs)
    answers["onnx int8"] = through_onnx(product / "model-int8.onnx", inputs)
    result = json.loads((product.parent / "result.json").read_text())

    for name, logits in answers.items():
        assert (logits.argmax(axis=1) == targets).mean() == pytest.approx(form(product, name)[f"{split}_accuracy"])
    assert len(targets) == facts(product)[f"{split}_samples"]
    key = {"test": "accuracy", "validation": "validation_accuracy"}[split]
    assert result[key] == form(product, "torch")[f"{split}_accuracy"]


def test_parameters_and_macs_are_those_of_the_layers(made: Path) -> None:
    product = facts(made / "runs/conv/seed-0/product")
    parameters = (16 * 9 + 2 * 16) + (32 * 16 * 9 + 2 * 32) + (32 * 10 + 10)
    macs = 8 * 8 * 16 * 9 + 4 * 4 * 32 * 16 * 9 + 32 * 10

    assert (parameters, macs) == (product["parameters"], product["macs"])


def test_macs_of_known_nets_are_the_known_ones() -> None:
    """As torchvision's documentation has them, in thousand millions: convolutions, and fused attention."""
    import torchvision

    for name, expected in {"resnet18": 1.81, "vit_b_16": 17.56}.items():
        with torch.device("meta"):
            model = torchvision.models.get_model(name).eval()
            macs = count_macs(model, torch.rand(1, 3, 224, 224))
        assert expected == pytest.approx(macs / 1e9, abs=0.01)


def test_sizes_and_hashes_are_those_of_the_files(made: Path) -> None:
    folder = made / "runs/conv/seed-0/product"
    names = {"model.safetensors", "model.onnx", "model-int8.onnx", "README.md"}

    assert names | {"product.json"} == {path.name for path in folder.iterdir()}
    assert names == facts(folder)["files"].keys()
    for name, found in facts(folder)["files"].items():
        data = (folder / name).read_bytes()
        assert {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} == found
    for variant in facts(folder)["variants"]:
        assert (folder / variant["file"]).stat().st_size == variant["bytes"]
    assert form(folder, "onnx int8")["bytes"] < form(folder, "onnx")["bytes"]


def test_seeds_have_their_spread(made: Path) -> None:
    results = [json.loads((made / f"runs/conv/seed-{seed}/result.json").read_text()) for seed in (0, 1)]
    test = [result["accuracy"] for result in results]
    validation = [result["validation_accuracy"] for result in results]

    assert {
        "seeds": [0, 1],
        "test_mean": statistics.fmean(test),
        "test_sd": statistics.stdev(test),
        "validation_mean": statistics.fmean(validation),
        "validation_sd": statistics.stdev(validation),
    } == facts(made / "runs/conv/seed-0/product")["seeds"]


def test_the_cache_is_named_by_id_and_digest(made: Path) -> None:
    training = facts(made / "runs/conv/seed-0/product")["training"]
    cache = logitcache.open(made / "tiny.cache")

    assert {"id": cache.id, "digest": cache.digest} == training["cache"]
    assert ("digits", CONV["loss"]) == (training["dataset"], training["loss"])
    assert (1295, 2) == (training["samples"], training["epochs"])


def test_the_difference_from_torch_is_that_on_training_samples(made: Path) -> None:
    folder = made / "runs/conv/seed-0/product"
    inputs = rendered(made, "train")[0][keyed_permutation(1295, "product", 0)[:7].copy()]
    with torch.inference_mode():
        expected = conv(folder / "model.safetensors")(inputs).numpy()
    difference = float(abs(through_onnx(folder / "model.onnx", inputs) - expected).max())
    stated = facts(folder)["onnx"]["max_abs_difference"]

    assert ["1", "7"] == list(stated)
    assert difference == pytest.approx(stated["7"], abs=2e-6)
    assert max(stated.values()) < 1e-5


def test_int8_is_calibrated_on_training_samples(made: Path, tmp_path: Path) -> None:
    """Made again from them by hand, it is the same file; from test samples it is another."""
    folder = made / "runs/conv/seed-0/product"
    chosen = keyed_permutation(1295, "product", 0)[:512].copy()
    quantise(folder / "model.onnx", tmp_path / "train.onnx", rendered(made, "train")[0][chosen])
    quantise(folder / "model.onnx", tmp_path / "test.onnx", rendered(made, "test")[0])

    assert (folder / "model-int8.onnx").read_bytes() == (tmp_path / "train.onnx").read_bytes()
    assert (folder / "model-int8.onnx").read_bytes() != (tmp_path / "test.onnx").read_bytes()
    assert {"calibration_samples": 512, "weights": 3} == facts(folder)["int8"]


def test_the_batch_is_free_and_int8_answers_row_by_row(made: Path) -> None:
    folder = made / "runs/conv/seed-0/product"
    inputs, _ = rendered(made, "test")
    for name in ("model.onnx", "model-int8.onnx"):
        together = through_onnx(folder / name, inputs[:65])
        apart = np.concatenate([through_onnx(folder / name, inputs[:64]), through_onnx(folder / name, inputs[64:65])])
        np.testing.assert_allclose(together, apart, atol=1e-5)


def test_latencies_are_of_both_batches_and_of_the_stated_processor(made: Path) -> None:
    product = facts(made / "runs/conv/seed-0/product")
    for variant in product["variants"]:
        assert ["1", "64"] == list(variant["latency_ms"])
        assert all(0 < value < 10_000 for value in variant["latency_ms"].values())
    assert 1 == product["latency"]["threads"]
    assert product["latency"]["processor"]


def test_engines_take_turns_on_one_thread() -> None:
    calls: list[tuple[str, int]] = []
    torch.set_num_threads(2)
    try:
        medians = median_seconds(
            {name: lambda name=name: calls.append((name, torch.get_num_threads())) for name in "ab"}
        )
        assert 2 == torch.get_num_threads()
    finally:
        torch.set_num_threads(1)

    assert [("a", 1), ("b", 1)] * (len(calls) // 2) == calls
    assert len(calls) == 2 * 205
    assert {"a", "b"} == medians.keys()


# The files


def test_a_loaded_student_takes_an_image(made: Path) -> None:
    folder = made / "runs/conv/seed-0/product"
    dataset = resolve_data(load_pipeline(made / "tiny.yaml"), trust=False).test
    assert dataset is not None
    student = load_student(folder)
    inputs, _ = rendered(made, "test")

    assert torch.equal(inputs[3], student.preprocess(dataset[3][0]))
    assert torch.equal(conv(made / "runs/conv/seed-0/last.safetensors")(inputs), student.model(inputs))
    assert [str(number) for number in range(10)] == student.class_names
    with pytest.warns(DeprecationWarning, match=r"LoadedStudent\.product is deprecated; use metadata"):
        assert student.metadata == student.product


def test_the_code_of_the_card_runs(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made / "runs/conv/seed-0/product"
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {"image": Image.fromarray(np.eye(8, dtype=np.uint8) * 255)}
    exec(blocks[0], namespace)
    expected = namespace["logits"].detach().numpy()
    namespace["inputs"] = namespace["inputs"].numpy()
    exec(blocks[1], namespace)

    assert 2 == len(blocks)
    np.testing.assert_allclose(expected, namespace["logits"], atol=1e-5)


def test_onnx_files_hold_nothing_of_this_machine(made: Path) -> None:
    """Torch leaves stack traces in them."""
    for name in ("model.onnx", "model-int8.onnx"):
        data = (made / "runs/conv/seed-0/product" / name).read_bytes()
        for secret in (str(Path(__file__).parents[2]), str(made), sys.prefix, "nets.py", 'File "'):
            assert secret.encode() not in data
        onnx.checker.check_model(onnx.load_from_string(data), full_check=True)


def test_the_card_says_what_product_json_says(made: Path) -> None:
    folder = made / "runs/conv/seed-0/product"
    card = ModelCard.load(folder / "README.md")
    torch_form = form(folder, "torch")
    stated = {result.dataset_split: result.metric_value for result in card.data.eval_results or []}

    assert ("mit", ["uci/digits"], ["accuracy"]) == (card.data.license, card.data.datasets, card.data.metrics)
    assert {"test": torch_form["test_accuracy"], "validation": torch_form["validation_accuracy"]} == stated
    text = card.text
    for variant in facts(folder)["variants"]:
        assert f"| `{variant['file']}` | {variant['bytes']:,} | {100 * variant['test_accuracy']:.2f} %" in text
    assert "5,178 parameters; 83,264 multiply-accumulates" in text
    assert str(logitcache.open(made / "tiny.cache").digest) in text
    assert json.dumps(NORMALISED, indent=1) in text
    assert str(made) not in text


def test_a_strangers_names_are_no_markup(run: Path, made: Path) -> None:
    for file, change in (("result.json", {"name": NASTY}),):
        (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | change))
    (run / "SHA256SUMS").unlink()
    pipeline = yaml.safe_load((run / "pipeline.yaml").read_text())
    pipeline["cache"]["card"] |= {"license": NASTY, "dataset": NASTY, "teacher": NASTY}
    (run / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    product = exported(run, to="safetensors")
    text = (product.folder / "README.md").read_text()
    body = ModelCard(text).text
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    kinds = {child.type for token in tokens for child in [token, *(token.children or [])]}

    assert not kinds & {"html_block", "html_inline", "link_open", "image"}
    assert 1 == len([token for token in tokens if token.type == "heading_open" and token.tag == "h1"])
    assert "\u202e" not in text


# Again, and beside


def test_exported_again_nothing_is_written(made: Path) -> None:
    folder = made / "runs/conv/seed-0/product"
    before = {path: path.stat().st_mtime_ns for path in (*folder.iterdir(), folder)}

    assert not exported(folder.parent, to="onnx", int8=True).written
    assert not exported(folder.parent, to="safetensors").written
    assert before == {path: path.stat().st_mtime_ns for path in (*folder.iterdir(), folder)}


def test_best_weights_go_to_a_folder_of_their_own(run: Path, tmp_path: Path) -> None:
    exported(run, to="safetensors")
    with pytest.raises(UsageError, match=r"an export of the last weights, not of this run's best; choose another -o"):
        exported(run, to="safetensors", weights="best")
    out = exported(run, tmp_path / "best", to="safetensors", weights="best").folder
    expected, found = load_file(run / "best.safetensors"), load_file(out / "model.safetensors")

    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "that accuracy is therefore optimistic" in (out / "README.md").read_text()


def test_what_killed_exports_left_is_removed_and_what_live_ones_have_stays(run: Path) -> None:
    for name in (".product.999999999.partial", ".product.1.partial"):
        (run / name).mkdir()
    exported(run, to="safetensors")

    assert [".product.1.partial"] == [path.name for path in run.iterdir() if path.name.startswith(".product")]


def test_a_killed_export_leaves_nothing_under_the_name_and_is_made_good(run: Path, forks: Any) -> None:
    process = forks.Process(target=_export_and_wait, args=(run,))
    process.start()
    process.join(120)

    assert -signal.SIGKILL == process.exitcode
    assert [".product."] == [path.name[:9] for path in run.iterdir() if "product" in path.name]
    assert exported(run, to="safetensors").written
    assert ["product"] == [path.name for path in run.iterdir() if "product" in path.name]


def _export_and_wait(run: Path) -> None:
    """Killed when the card is about to be written: everything else is there."""
    from logitcache.extras.student_export import export

    export.render_model_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,misc]
    exported(run, to="safetensors")


def test_what_was_moved_aside_comes_back(run: Path) -> None:
    """An export that was killed between its two renames."""
    folder = exported(run, to="safetensors").folder
    folder.rename(run / ".product.999999999.before")

    assert not exported(run, to="safetensors").written
    assert ["product"] == [path.name for path in run.iterdir() if "product" in path.name]


# Refusals


def left_alone(run: Path) -> bool:
    return not any("product" in path.name for path in run.iterdir())


def test_a_folder_with_something_else_is_left_as_it_is(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="contains other files"):
        exported(run, other, to="safetensors")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is not a folder"):
        exported(run, tmp_path / "file", to="safetensors")
    with pytest.raises(StorageError, match="can't write"):
        exported(run, tmp_path / "file/below", to="safetensors")

    assert ["mine"] == [path.read_text() for path in other.iterdir()]


def test_an_edited_card_is_not_written_over(run: Path) -> None:
    folder = exported(run, to="safetensors").folder
    (folder / "README.md").write_text("my own words")
    with pytest.raises(UsageError, match=r"README\.md was modified after the export; move that folder away"):
        exported(run, to="onnx")
    (folder / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"files that are not part of the export \('notes\.txt'\)"):
        exported(run, to="onnx")

    assert "my own words" == (folder / "README.md").read_text()


def test_data_of_another_kind_are_refused(run: Path, made: Path) -> None:
    with pytest.raises(IdentityMismatch, match=r"data\.validation: 0\.2 here, 0\.1 there"):
        exported(run, to="safetensors", data=load_pipeline(made / "tiny.yaml", ["data.validation=0.2"]))
    (run / "pipeline.yaml").unlink()
    with pytest.raises(UsageError, match="name a pipeline with --data"):
        exported(run, to="safetensors")
    assert left_alone(run)
    assert exported(run, to="safetensors", data=load_pipeline(made / "tiny.yaml")).written


def test_weights_that_do_not_reach_the_runs_accuracy_are_refused(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"accuracy": result["accuracy"] - 0.1}))
    (run / "SHA256SUMS").unlink()
    with pytest.raises(IdentityMismatch, match=r"on the test split: .*; its result\.json has"):
        exported(run, to="safetensors")
    assert left_alone(run)


def test_what_is_no_finished_run_of_a_student_is_refused(run: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no run; expected a folder such as"):
        exported(run.parent, to="onnx")
    with pytest.raises(UsageError, match="is a teacher's run"):
        exported(made / "runs/teacher", to="onnx")
    (run / "result.json").rename(tmp_path / "result.json")
    with pytest.raises(UsageError, match="is not finished; `logitcache train-student` resumes it"):
        exported(run, to="onnx")
    (run / "result.json").write_text("{")
    with pytest.raises(UsageError, match="can't be read"):
        exported(run, to="onnx")


def test_without_onnx_the_extra_is_named_and_safetensors_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"ONNX needs onnxscript: pip install 'logitcache\[onnx\]'"):
        exported(run, to="onnx")
    assert left_alone(run)
    assert exported(run, to="safetensors").written


@pytest.fixture
def odd(tiny: Make) -> Callable[[str], Path]:
    """The run of a student whose net is one of `tests.models`."""

    def train(net: str) -> Path:
        student = {"name": "odd", "model": f"tests.models:{net}", "loss": "cross_entropy"}
        pipeline = tiny(f"students=[{json.dumps(student)}]", "train.epochs=1", "train.lr=0.001")
        train_students(pipeline)
        return Path(pipeline.runs.path) / "odd/seed-0"

    return train


def test_a_graph_with_nothing_to_quantise_is_refused(odd: Callable[[str], Path]) -> None:
    run = odd("Distances")
    with pytest.raises(UsageError, match=r"no weights that can be quantized to int8.*export without --int8"):
        exported(run, to="onnx", int8=True)
    assert left_alone(run)
    assert exported(run, to="onnx").written


def test_a_net_that_onnx_can_not_say_is_refused(odd: Callable[[str], Path]) -> None:
    run = odd("Branching")
    with pytest.raises(UsageError, match=r"can't be exported to ONNX with a dynamic batch size: .*--to safetensors"):
        exported(run, to="onnx")
    assert left_alone(run)
    assert exported(run, to="safetensors").written


def test_a_net_that_says_something_else_in_onnx_is_refused(odd: Callable[[str], Path]) -> None:
    run = odd("Noisy")
    with pytest.raises(InvalidLogits, match=r"differ from torch's by .* on a batch of 1; the tolerance is"):
        exported(run, to="onnx")
    assert left_alone(run)


def test_an_onnx_model_of_other_weights_is_noticed(made: Path) -> None:
    path = made / "runs/conv/seed-0/product/model.onnx"
    inputs, _ = rendered(made, "test")
    compare_with_torch(conv(made / "runs/conv/seed-0/last.safetensors"), OnnxModel(path, threads=1), inputs)
    with pytest.raises(InvalidLogits, match="the tolerance is"):
        compare_with_torch(conv(made / "runs/conv/seed-1/last.safetensors"), OnnxModel(path, threads=1), inputs)


def test_a_damaged_export_is_not_loaded(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "runs/conv/seed-0/product", tmp_path / "p")
    data = bytearray((tmp_path / "p/model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "p/model.safetensors").write_bytes(data)
    with pytest.raises(CorruptCache, match="is not the file that was exported"):
        load_student(tmp_path / "p")
    shutil.copy(made / "runs/conv/seed-0/product/model.safetensors", tmp_path / "p/model.safetensors")
    large = facts(tmp_path / "p")
    large["model"]["args"]["widths"] = [16, 10**9]
    (tmp_path / "p/product.json").write_text(json.dumps(large))
    with pytest.raises(UsageError, match=r"does not fit the model that product\.json describes: 5,2\d\d values, not"):
        load_student(tmp_path / "p")
    (tmp_path / "p/model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"contains no model\.safetensors; export the run with --to safetensors"):
        load_student(tmp_path / "p")
    (tmp_path / "p/product.json").write_text('{"format": 2}')
    with pytest.raises(UsageError, match="is not the metadata of an exported student"):
        load_student(tmp_path / "p")


# The command and the report


def test_the_command_prints_the_table_and_json(made: Path) -> None:
    table = command("export", made / "runs/conv/seed-0", "--to", "onnx", "--int8")
    printed = json.loads(command("export", made / "runs/conv/seed-0", "--to", "onnx", "--json").stdout)

    assert 0 == table.returncode
    for expected in ("5,178 parameters, 83,264 MACs", "onnx int8", "model-int8.onnx", "already complete"):
        assert expected in table.stdout
    assert facts(made / "runs/conv/seed-0/product").items() <= printed.items()


def test_wrong_pairs_are_refused(made: Path, tmp_path: Path) -> None:
    cache, run = made / "tiny.cache", made / "runs/conv/seed-0"

    refused(
        command("export", cache, "--to", "onnx"),
        2,
        "is a cache: use --to parquet, huggingface, distillkit, axolotl; --to onnx needs a run",
    )
    refused(command("export", run, "--to", "parquet", "-o", tmp_path / "x"), 2, "is a run: use --to safetensors")
    refused(command("export", run, "--to", "safetensors", "--int8"), 2, "--int8 makes an ONNX model; add --to onnx")
    refused(command("export", run, "--to", "onnx", "--top", "3"), 2, "--views and --top apply to caches, not to runs")
    refused(
        command("export", cache, "--to", "parquet", "-o", tmp_path / "x", "--int8"),
        2,
        "--int8 and --weights apply to runs",
    )
    refused(command("export", cache, "--to", "parquet"), 2, "--to parquet needs an output folder: add -o FOLDER")
    assert not (tmp_path / "x").exists()


def test_the_report_shows_what_was_exported(made: Path, tmp_path: Path) -> None:
    from logitcache.extras.report import write_report
    from logitcache.extras.report.formatting import percent

    folder = made / "runs/conv/seed-0/product"
    page = write_report(made / "tiny.cache", tmp_path / "r.html", runs=made / "runs").path.read_text()
    int8 = form(folder, "onnx int8")

    for expected in (
        percent(int8["test_accuracy"]),
        rich.filesize.decimal(int8["bytes"]),
        "83\N{NARROW NO-BREAK SPACE}264",
    ):
        assert expected in page
    shutil.copytree(made / "runs", tmp_path / "runs")
    shutil.copy(made / "runs/conv/seed-1/last.safetensors", tmp_path / "runs/conv/seed-0/last.safetensors")
    page = write_report(made / "tiny.cache", tmp_path / "r.html", runs=tmp_path / "runs").path.read_text()
    (tmp_path / "runs/conv/seed-0/product/product.json").write_text(json.dumps(facts(folder) | {"macs": -(10**400)}))
    write_report(made / "tiny.cache", tmp_path / "r2.html", runs=tmp_path / "runs")

    assert "The export of conv is left out" in page
    assert "int8 accuracy" not in page
