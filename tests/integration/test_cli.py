"""The command line: wrong input gives one clear message, its exit code, and leaves what was there intact."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from logitcache import open as opened
from tests.commands import logitcache, refused
from tests.conftest import ALL_DIGITS, tiny_settings

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny pipeline and its cache."""
    folder = tmp_path_factory.mktemp("cli")
    raw = tiny_settings(folder, *ALL_DIGITS)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    assert 0 == logitcache("cache-teacher", folder / "tiny.yaml").returncode
    return folder


@pytest.fixture
def intact(folder: Path) -> Iterator[None]:
    """Whatever a test does, the cache stays as it was."""
    before = {path: path.read_bytes() for path in (folder / "tiny.cache").rglob("*") if path.is_file()}
    yield
    assert before == {path: path.read_bytes() for path in (folder / "tiny.cache").rglob("*") if path.is_file()}


def test_info_prints_the_keys_that_scripts_rely_on(folder: Path) -> None:
    info = json.loads(logitcache("info", folder / "tiny.cache", "--json").stdout)

    assert {
        "id",
        "digest",
        "sealed",
        "num_samples",
        "num_views",
        "num_classes",
        "encoding",
        "bytes",
        "bytes_per_sample",
    } <= info.keys()
    assert (True, 1295, 2, 10, "Dense(dtype='float32')") == tuple(
        info[key] for key in ("sealed", "num_samples", "num_views", "num_classes", "encoding")
    )
    assert 30 < info["bytes_per_sample"] < 44


def test_info_and_cache_teacher_repeat_nothing_and_name_the_next_command(folder: Path) -> None:
    shown = logitcache("info", folder / "tiny.cache").stdout
    again = logitcache("cache-teacher", folder / "tiny.yaml", "views.count=2").stdout
    by_hand = logitcache("cache-teacher", folder / "tiny.yaml", "views.count=2", "--json").stdout

    labels = [line.split("│")[1].strip() for line in shown.splitlines() if line.count("│") > 1]
    assert {"teacher", "dataset name", "dataset hash", "num samples", "num views", "kl mean, nats"} <= set(labels)
    assert set() == {"teacher name", "num rows", "bytes per row", "views"} & set(labels)
    assert f"Next: logitcache train-student {folder / 'tiny.yaml'} views.count=2\n" in again
    assert {"teacher_name", "num_rows", "bytes_per_row", "views"} < json.loads(by_hand).keys()


def test_the_sizes_that_info_shows_add_up(folder: Path) -> None:
    shown = logitcache("info", folder / "tiny.cache").stdout
    cells = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if line.count("│") > 1]
    found = {label: value.replace(",", "") for _, label, value, _ in cells}
    logits, once = int(found["bytes of logits"]), int(found["bytes stored once (samples, encoding)"])

    assert int(found["bytes"]) == logits + once
    assert logits > once > 0
    assert float(found["bytes of logits per sample and view"]) == pytest.approx(logits / (1295 * 2), rel=1e-3)
    assert not {"bytes per sample", "bytes_of_logits"} & found.keys()


def test_a_cache_and_its_plan_are_shown_in_one_line(folder: Path) -> None:
    cache = opened(folder / "tiny.cache")
    shape = "num_samples=1295, num_classes=10, views=range(0, 2), encoding=Dense(dtype='float32'), sealed=True"

    assert f"LogitCache('{folder}/tiny.cache', {shape})" == repr(cache)
    assert "array" not in repr(cache.view_plan)
    assert "num_samples=1295" in repr(cache.view_plan)


def test_ls_lists_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)

    assert ["tiny.cache"] == [
        Path(each["url"]).name for each in json.loads(logitcache("ls", "--json").stdout)["caches"]
    ]


def test_a_dry_run_of_a_valid_pipeline_calls_it_valid(folder: Path) -> None:
    shown = logitcache("run", "--dry-run", folder / "tiny.yaml").stdout
    uncalled = logitcache("run", "--dry-run", CHECKOUT / "pipelines/s1_features.yaml").stdout

    assert shown.endswith(f"{folder / 'tiny.yaml'} is valid.\n")
    assert "s1_features.yaml is valid.\n" in uncalled
    assert "note: pipelines.s1_features:random_rows was not called; --require-data calls it" in uncalled


def test_verify_states_differences_from_a_pipeline_as_sentences(folder: Path) -> None:
    found = logitcache("verify", folder / "tiny.cache", "views.seed=99", "--data", folder / "tiny.yaml")

    expected = (
        f"{folder}/tiny.cache does not match the pipeline; they differ in\n  view_seed: 3 in the cache, 99 here\n"
    )
    assert (1, expected) == (found.returncode, found.stdout)


def test_out_is_the_old_name_of_output(folder: Path, tmp_path: Path) -> None:
    export = ("export", folder / "tiny.cache", "--to", "parquet")
    with pytest.warns(DeprecationWarning, match="`--out` is removed in the next release: use `--output`"):
        assert 0 == logitcache(*export, "--out", tmp_path / "old").returncode
    assert 0 == logitcache(*export, "--output", tmp_path / "new").returncode

    assert [path.name for path in (tmp_path / "new").iterdir()] == [path.name for path in (tmp_path / "old").iterdir()]
    refused(logitcache(*export, "--out", "a", "-o", "b"), 2, "--out is the old name of --output; give one of them")
    refused(logitcache("merge", folder / "tiny.cache"), 2, "add --output CACHE")
    assert all("--out " not in logitcache(command, "--help").stdout for command in ("merge", "export"))


def test_verify_prints_ok_and_no_problem(folder: Path) -> None:
    result = logitcache("verify", f"file://{folder}/tiny.cache", "--deep", "--data", folder / "tiny.yaml", "--json")

    assert ({"ok": True, "problems": []}, 0) == (json.loads(result.stdout), result.returncode)


def test_verify_compares_with_a_pipeline_whose_keys_are_overridden(folder: Path) -> None:
    """As every command that takes a pipeline: the file asks for other views, the command line for the cache's."""
    verify = ("verify", folder / "tiny.cache")
    data = ("--data", folder / "tiny.yaml", "--json")
    other = json.loads(logitcache(*verify, "views.seed=99", *data).stdout)

    assert ["view_seed: 3 in the cache, 99 here"] == [problem["path"] for problem in other["problems"]]
    assert 0 == logitcache(*verify, "views.seed=3", "views.count=1", *data).returncode
    refused(logitcache(*verify, "views.cuont=1", *data[:2]), 2, "unknown key 'views.cuont'; did you mean 'count'?")


def test_every_command_with_data_takes_overrides_and_needs_a_pipeline_for_them(folder: Path, tmp_path: Path) -> None:
    cache, data = folder / "tiny.cache", ("--data", folder / "tiny.yaml")
    commands = [("verify", cache), ("repair", cache), ("report", cache, "-o", tmp_path / "report.html")]
    commands.append(("export", folder / "runs/small/seed-0", "--to", "safetensors"))

    for command in commands:
        refused(logitcache(*command, "views.count=1"), 2, "'views.count=1' overrides a pipeline key", "add --data")
        refused(logitcache(*command, "views.cuont=1", *data), 2, "unknown key 'views.cuont'")


def test_verify_says_what_it_could_not_compare_and_which_views_are_missing(folder: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((folder / "tiny.yaml").read_text())
    raw["views"]["count"] = 5
    raw["teacher"]["weights"] = "trained"  # and nobody has trained it
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(raw))
    result = logitcache("verify", folder / "tiny.cache", "--data", tmp_path / "more.yaml", "--json")

    assert 1 == result.returncode
    assert "views.count: 2 in the cache, 5 here" in [found["path"] for found in json.loads(result.stdout)["problems"]]
    assert "only its name was compared" in result.stderr


def test_places_that_are_not_there_or_not_on_this_machine_are_misuse(folder: Path, tmp_path: Path) -> None:
    cache = folder / "tiny.cache"
    refused(logitcache("ls", tmp_path / "nothing"), 2, "no such folder")
    refused(logitcache("export", cache, "--to", "parquet", "-o", "s3://team/labels"), 2, "not a path on this machine")
    refused(logitcache("report", cache, "-o", "s3://team/report.html"), 2, "not a path on this machine")

    assert not Path("s3:").exists()


def test_names_stay_whole_where_another_program_reads_them(folder: Path, tmp_path: Path) -> None:
    long = tmp_path / ("a name of many words " * 8).strip()
    shutil.copytree(folder / "tiny.cache", long / "a.cache")

    assert str(long / "a.cache") in logitcache("ls", long).stdout


def test_verify_exits_with_one_on_a_problem(folder: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((folder / "tiny.yaml").read_text())
    raw["views"]["seed"] = 99
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw))
    result = logitcache("verify", folder / "tiny.cache", "--data", tmp_path / "other.yaml", "--json")
    found = json.loads(result.stdout)

    assert (1, False) == (result.returncode, found["ok"])
    assert [{"block": "", "path": "view_seed: 3 in the cache, 99 here", "kind": "differs"}] == found["problems"]


def test_train_student_prints_its_rows(folder: Path, tmp_path: Path) -> None:
    result = logitcache(
        "train-student",
        folder / "tiny.yaml",
        "--student",
        "small",
        f"runs.path={tmp_path}",
        "train.seeds=[0, 1]",
        "--json",
    )
    (row,) = json.loads(result.stdout)["rows"]

    assert {"name", "accuracy_mean", "accuracy_sd", "epoch_seconds"} <= row.keys()
    assert ("small", [0, 1]) == (row["name"], row["seeds"])


def test_a_dry_run_prints_what_would_be_done_and_does_nothing(folder: Path, tmp_path: Path) -> None:
    result = logitcache("run", folder / "tiny.yaml", "--dry-run", "--json", f"runs.path={tmp_path}/runs")
    steps = json.loads(result.stdout)["steps"]

    assert [("cache-teacher", True), ("train-student", False), ("train-student", False)] == [
        (step["stage"], step["done"]) for step in steps
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("views.seed=4", "view_seed: 3 in the cache, 4 here"),
        ("views.transform=clean", "transform.shared: "),
        ("views.mixup=0.2", "transform.mixing: "),
        ("teacher.model=cnn", "teacher: mlp@"),
        ("teacher.precision=bfloat16", "precision: float32 in the cache, bfloat16 here"),
        ("cache.encoding={name: topk, k: 5}", "encoding.name: dense in the cache, topk here"),
        ("cache.outputs={hidden: '1'}", "output_encodings.hidden: "),
        ("cache.rows_per_block=128", "rows_per_block: 256 in the cache, 128 here"),
        ("data.validation=0.2", "num_samples: 1295 in the cache, "),
    ],
)
def test_a_dry_run_finds_that_the_cache_is_another_one(folder: Path, override: str, difference: str) -> None:
    """With the exit code of the command that then fails."""
    result = logitcache("run", "--dry-run", folder / "tiny.yaml", override, "--json")
    step = json.loads(result.stdout)["steps"][0]

    assert ("cache-teacher", False) == (step["stage"], step["done"])
    assert f"{folder}/tiny.cache holds another cache" in step["conflict"]
    assert f"  {difference}" in step["conflict"]
    assert 1 == result.returncode


def test_what_a_dry_run_states_of_a_cache_is_what_the_stage_states(folder: Path) -> None:
    dry = logitcache("run", "--dry-run", folder / "tiny.yaml", "views.seed=4")
    real = logitcache("cache-teacher", folder / "tiny.yaml", "views.seed=4")

    assert (1, 1) == (dry.returncode, real.returncode)
    assert "differs in\n    view_seed: 3 in the cache, 4 here\n" in dry.stdout
    assert "differs in\n  view_seed: 3 in the cache, 4 here\n" in real.stderr
    assert dry.stdout.endswith("tiny.yaml is valid, but in conflict with existing results.\n")
    assert 1 == logitcache("run", "--dry-run", folder / "tiny.yaml", folder / "tiny.yaml", "views.seed=4").returncode


def test_a_dry_run_finds_runs_of_other_settings(folder: Path, tmp_path: Path) -> None:
    pipeline = (folder / "tiny.yaml", f"runs.path={tmp_path}/runs", "train.epochs=1")
    other = f"cache.path={tmp_path}/other.cache"
    assert 0 == logitcache("train-student", *pipeline).returncode
    assert 0 == logitcache("cache-teacher", *pipeline, other, "cache.encoding={name: dense, dtype: float16}").returncode

    def conflicts(*overrides: str) -> tuple[int, list[str]]:
        result = logitcache("run", "--dry-run", *pipeline, *overrides, "--json")
        found = [step["conflict"] for step in json.loads(result.stdout)["steps"] if step["conflict"]]
        return result.returncode, [re.findall(r"differs in (.*)\)", each)[0] for each in found]

    assert (0, []) == conflicts()
    assert (2, ["train.epochs", "train.epochs"]) == conflicts("train.epochs=2")
    assert (2, ["student.loss.temperature"]) == conflicts("students.small.loss.temperature=3.0")
    assert (2, ["num_views"]) == conflicts("views.count=1")  # a student on true labels sees new views
    assert (2, ["labels.cache"]) == conflicts(other, "cache.encoding={name: dense, dtype: float16}")
    refused(logitcache("train-student", *pipeline, "train.epochs=2"), 2, "differs in train.epochs")


def test_a_dry_run_lists_a_damaged_run_with_the_exit_code_of_the_stage(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "small/seed-0"
    run.mkdir(parents=True)
    (run / "run.yaml").write_text("[")
    result = logitcache("run", "--dry-run", folder / "tiny.yaml", f"runs.path={tmp_path}")

    assert 1 == result.returncode
    assert f"conflict: train-student: {run}/run.yaml is damaged" in result.stdout


def test_a_dry_run_names_a_data_file_that_is_missing(folder: Path, tmp_path: Path) -> None:
    """Although the function that reads it is not called."""
    raw = yaml.safe_load((folder / "tiny.yaml").read_text())
    raw["data"] = {"name": "tests.models:pictures", "args": {"file": f"{tmp_path}/images.npz"}}
    raw["cache"]["path"] = f"{tmp_path}/a.cache"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(raw))
    shown = logitcache("run", "--dry-run", tmp_path / "own.yaml")
    folders = logitcache("run", "--dry-run", CHECKOUT / "pipelines/s4_imagenet.yaml")

    assert 0 == shown.returncode
    assert f"not ready: data.args.file: {tmp_path}/images.npz does not exist" in shown.stdout
    assert shown.stdout.endswith(f"own.yaml is valid; missing data: {tmp_path}/images.npz.\n")
    assert (0, True) == (folders.returncode, "s4_imagenet.yaml is valid; missing data: " in folders.stdout)
    (tmp_path / "images.npz").touch()
    assert logitcache("run", "--dry-run", tmp_path / "own.yaml").stdout.endswith("own.yaml is valid.\n")


def test_a_dry_run_checks_any_number_of_files_without_their_data(tmp_path: Path) -> None:
    """Pipelines and federations; an invalid one doesn't hide the others."""
    files = sorted(CHECKOUT.glob("pipelines/**/*.yaml"))
    (tmp_path / "typo.yaml").write_text(
        (CHECKOUT / "pipelines/s4_imagenet.yaml").read_text().replace("resnet50", "resnet5O")
    )
    result = logitcache("run", "--dry-run", *files, "--json")
    found = {Path(each["file"]).stem: each for each in json.loads(result.stdout)["pipelines"]}

    assert (result.returncode, len(found)) == (0, len(files))
    assert [name for name, each in found.items() if each["error"] or not each["steps"]] == []
    assert "the folder imagenet does not exist" in found["s4_imagenet"]["missing"][0]
    assert found["s1_features"]["unchecked"] == [
        "pipelines.s1_features:random_rows was not called; --require-data calls it"
    ]
    result = logitcache("run", "--dry-run", tmp_path / "typo.yaml", CHECKOUT / "pipelines/s1_features.yaml", "--json")
    typo, valid = json.loads(result.stdout)["pipelines"]
    assert (result.returncode, valid["error"]) == (2, None)
    assert "did you mean 'resnet50'?" in typo["error"]


def test_a_dry_run_that_requires_data_exits_with_one_where_some_is_missing() -> None:
    s4 = CHECKOUT / "pipelines/s4_imagenet.yaml"

    assert logitcache("run", "--dry-run", s4).returncode == 0
    assert logitcache("run", "--dry-run", "--require-data", s4).returncode == 1
    assert logitcache("run", "--dry-run", "--require-data", CHECKOUT / "pipelines/s1_features.yaml").returncode == 0
    refused(logitcache("run", s4, s4), 2, "only --dry-run takes several")
    refused(logitcache("run", "--require-data", s4), 2, "--require-data needs --dry-run")


def test_the_installed_command_runs_in_a_process_of_its_own(folder: Path) -> None:
    result = logitcache("info", folder / "gone", limit_file_bytes=10**6)

    refused(result, 2, "error: ", "is not a logit cache")


def test_an_encoding_that_does_not_fit_the_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    ended = logitcache("cache-teacher", folder / "tiny.yaml", "cache.encoding=TopK(k=10)", f"cache.path={tmp_path}/new")

    refused(ended, 2, "keeps every one of 10 classes")


@pytest.mark.usefixtures("intact")
@pytest.mark.parametrize(
    ("command", "override", "exit_code", "message"),
    [
        pytest.param("cache-teacher", "views.cuont=3", 2, "unknown key 'views.cuont'; did you mean 'count'?", id="key"),
        pytest.param("cache-teacher", "data.field=x", 2, "is written data.args.field", id="argument"),
        pytest.param("cache-teacher", "student.0.name=x", 2, "did you mean 'students'?", id="section"),
        pytest.param(
            "train-student",
            "students.smal.loss=js",
            2,
            "unknown item 'students.smal'; did you mean 'small'? Expected a number from 0 to",
            id="student",
        ),
        pytest.param("cache-teacher", "students.small.train.lrr=1", 2, "did you mean 'lr'?", id="key of a student"),
        pytest.param("cache-teacher", "views.count=none", 2, "views.count: Input should be a valid integer", id="type"),
        pytest.param("cache-teacher", "views.count=0", 2, "views.count: Input should be greater than", id="range"),
        pytest.param("cache-teacher", "no override", 2, "is not a valid override", id="no override"),
        pytest.param("cache-teacher", "cache.encoding.k=3", 2, "encoding 'dense' has no parameter 'k'", id="encoding"),
        pytest.param("cache-teacher", "cache.encoding=TopK(k=3)", 1, "holds another cache", id="another cache"),
        pytest.param(
            "cache-teacher", "cache.rows_per_block=9", 1, "rows_per_block: 256 in the cache, 9 here", id="rows"
        ),
        pytest.param("cache-teacher", "data.name=imagenet", 2, "unknown dataset 'imagenet'", id="dataset"),
        pytest.param("cache-teacher", "data.name=cifar10", 2, "To get it: set data.download=true", id="no data"),
        pytest.param("cache-teacher", "data.name=os.path:join", 2, "re-run with --trust", id="foreign code"),
        pytest.param("cache-teacher", "teacher.model=resnet5O", 2, "did you mean 'resnet50'?", id="model"),
        pytest.param("cache-teacher", "teacher.args.widht=3", 2, "unexpected keyword argument 'widht'", id="argument"),
        pytest.param("cache-teacher", "teacher.args.hidden=[-5]", 2, "model 'mlp' can't be built", id="negative width"),
        pytest.param(
            "cache-teacher", "teacher.weights=null", 2, "'mlp' has no weights; set teacher.weights", id="none"
        ),
        pytest.param(
            "cache-teacher", "data.validation=0.0001", 2, "selects no sample of any class; increase it", id="nothing"
        ),
        pytest.param("train-teacher", "runs.path=/tmp/none", 2, "set teacher.weights=trained", id="ready teacher"),
        pytest.param(
            "train-student", "students.small.samples=0.0001", 2, "selects no sample of any class", id="no samples"
        ),
        pytest.param("train-student", "students.small.name=..", 2, "should match pattern", id="name"),
        pytest.param("train-student", "students.small.loss=3", 2, "a loss is a name or a mapping", id="no loss"),
        pytest.param("train-student", "students.small.loss.temperature=hot", 2, "a temperature is a number", id="word"),
        pytest.param(
            "cache-teacher",
            "teacher.weights=gone.safetensors",
            2,
            "weights file gone.safetensors does not exist",
            id="file",
        ),
        pytest.param(
            "cache-teacher", "teacher.weights=README.safetensors", 2, "README.safetensors does not exist", id="weights"
        ),
        pytest.param("cache-teacher", "device=cuda:7", 2, "device 'cuda:7' is not available", id="device"),
        pytest.param("cache-teacher", "cache.path=ftp://team/x.cache", 2, "s3://", id="scheme"),
        pytest.param("train-student", "cache.path=gone.cache", 2, "is not a logit cache", id="no cache"),
        pytest.param("train-student", "views.seed=8", 1, "view_seed: 3 in the cache, 8 here", id="other views"),
        pytest.param("train-student", "students.small.loss.T=8", 2, "loss 'kl' has no parameter 'T'", id="loss"),
    ],
)
def test_wrong_input_says_what_is_wrong(
    folder: Path, command: str, override: str, exit_code: int, message: str
) -> None:
    refused(logitcache(command, folder / "tiny.yaml", override), exit_code, message)


def test_a_transform_that_fails_on_a_sample_names_both(folder: Path, tmp_path: Path) -> None:
    overrides = ["views.transform=[{RandomCrop: {size: 100}}]", f"cache.path={tmp_path}/x"]

    refused(
        logitcache("cache-teacher", folder / "tiny.yaml", *overrides),
        2,
        "the transform of `views.transform` fails on sample '0' (Image of size (8, 8)): ValueError: Required crop size",
    )


def test_a_missing_pipeline_and_one_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("data: [")
    (tmp_path / "list.yaml").write_text("- data")
    (tmp_path / "digits.yaml").write_text(f"data: {'9' * 5000}")

    refused(logitcache("cache-teacher", tmp_path / "gone.yaml"), 2, "gone.yaml does not exist")
    refused(logitcache("cache-teacher", tmp_path / "bad.yaml"), 2, "bad.yaml is not valid YAML")
    refused(
        logitcache("cache-teacher", tmp_path / "digits.yaml"), 2, "digits.yaml is not valid YAML: Exceeds the limit"
    )
    refused(logitcache("cache-teacher", tmp_path / "list.yaml"), 2, "expected a pipeline: a mapping with")


def test_no_cache_there_and_a_newer_one(folder: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer.cache"
    newer.mkdir()
    text = (folder / "tiny.cache" / "manifest.json").read_text()
    (newer / "manifest.json").write_text(text.replace('"format_version": 2', '"format_version": 7'))

    refused(logitcache("info", tmp_path), 2, "is not a logit cache: it has no manifest.json")
    refused(logitcache("info", tmp_path / "manifest.json"), 2, f"expected the folder that it is in, '{tmp_path}'")
    refused(logitcache("verify", CHECKOUT / "README.md"), 2, "is not a logit cache")
    refused(logitcache("info", newer), 2, "format version 7; this logitcache reads up to 2: upgrade logitcache")


def test_nan_logits_are_refused_and_nothing_is_stored(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.cache"
    overrides = ["teacher.model=tests.models:nan_mlp", "teacher.args={}", f"cache.path={path}"]

    refused(
        logitcache("cache-teacher", folder / "tiny.yaml", *overrides), 1, "view 0, row 0: the teacher's logits hold NaN"
    )
    assert not list(path.rglob("receipts/v*/*"))


def test_a_teacher_of_other_classes_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    overrides = ["teacher.model=tests.models:dropout_mlp", "teacher.args={num_classes: 7}", f"cache.path={tmp_path}/x"]

    refused(
        logitcache("cache-teacher", folder / "tiny.yaml", *overrides),
        1,
        "returns (1, 7) for one sample; expected (1, 10)",
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_can_not_be_read_is_named(folder: Path, tmp_path: Path, workers: int) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 9, 9)).save(tmp_path / "photos" / label / f"{number}.png")
    (tmp_path / "photos" / "dog" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    overrides = [
        "data={name: image_folder, root: " + str(tmp_path / "photos") + "}",
        f"cache.path={tmp_path}/x",
        f"num_workers={workers}",
    ]

    refused(
        logitcache("cache-teacher", folder / "tiny.yaml", *overrides), 1, "sample 'dog/2.png' (number 6) can't be read"
    )


def test_a_file_that_may_not_grow_keeps_what_is_committed(folder: Path, tmp_path: Path) -> None:
    """The kernel refuses writes past a limit, as it does on a full disk."""
    path = tmp_path / "small.cache"
    pipeline = [folder / "tiny.yaml", f"cache.path={path}"]
    refused(
        logitcache("cache-teacher", *pipeline, limit_file_bytes=8_000), 1, "can't write", "run the same command again"
    )
    assert 0 == logitcache("cache-teacher", *pipeline).returncode
    assert 0 == logitcache("verify", path, "--deep").returncode


def test_a_full_disk_says_so_and_the_build_goes_on_when_there_is_space(folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"CI must be able to mount a small disk: {mounted.stderr!r}")
        pytest.skip("mounting a small disk needs root")
    try:
        pipeline = [folder / "tiny.yaml", f"cache.path={disk}/x.cache"]
        refused(logitcache("cache-teacher", *pipeline), 1, "the disk is full; free some space")
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert 0 == logitcache("cache-teacher", *pipeline).returncode
        assert 0 == logitcache("verify", f"{disk}/x.cache", "--deep").returncode
    finally:
        subprocess.run(["umount", disk], check=True)


def test_no_permission_names_the_path(folder: Path) -> None:
    """Below /proc nobody may make folders, not even root."""
    result = logitcache("cache-teacher", folder / "tiny.yaml", "cache.path=/proc/sys/x.cache")

    refused(result, 1, "can't lock /proc/sys/x.cache: ")


def test_json_errors_are_one_object_too(folder: Path) -> None:
    result = logitcache("info", folder / "nothing", "--json")

    assert "NotACache" == json.loads(result.stdout)["kind"]
    assert 2 == result.returncode


@pytest.mark.parametrize(
    "command",
    ["", "demo", "report", "train-teacher", "cache-teacher", "train-student", "run", "info", "verify", "suspects"],
)
def test_every_command_explains_itself(command: str) -> None:
    result = logitcache(*command.split(), "--help")

    assert 0 == result.returncode
    assert "Usage:" in result.stdout
    assert ["--help"] == [line.split()[1] for line in result.stdout.splitlines() if "<bool>" in line]


def test_the_package_can_be_run_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "logitcache", "info"], capture_output=True, text=True, check=False)

    assert 2 == result.returncode
    assert "Usage: python -m logitcache info" in result.stderr
