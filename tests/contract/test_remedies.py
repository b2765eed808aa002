"""Mistakes that anybody makes, each with an error that gives the remedy."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import logitcache
from logitcache.config.schema import Pipeline
from logitcache.data.transforms import build_transform
from logitcache.errors import ShapeError, StorageError, UnreadableSample, UsageError
from logitcache.stages.cache_teacher import cache_teacher
from logitcache.storage import open_storage
from tests.models import Pictures

Make = Callable[..., Pipeline]
PICTURES = ["data.name=tests.models:pictures", "data.validation=0", "cache.rows_per_block=16"]


class Plain:
    """Samples as they are given."""

    def __init__(self, samples: list[Any], length: int | None = None, **attributes: Any) -> None:
        self.samples, self.length = samples, length
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.samples) if self.length is None else self.length

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


# A loader that runs past the dataset


def test_a_for_loop_over_views_ends_with_the_dataset() -> None:
    views = logitcache.ViewDataset(Pictures(), logitcache.ViewPlan())

    assert list(range(40)) == logitcache.split_index([index for index, _, _ in views])[1].tolist()


@pytest.mark.parametrize("beyond", [40, -1])
def test_an_index_beyond_the_dataset_says_which_there_are(beyond: int) -> None:
    views = logitcache.ViewDataset(Pictures(), logitcache.ViewPlan())
    loader = DataLoader(views, batch_sampler=[[0, beyond]])

    with pytest.raises(UsageError, match=rf"no sample {beyond}: the dataset has 40 samples, 0 to 39. Make the sampler"):
        next(iter(loader))


def test_a_length_that_the_samples_do_not_have_is_named() -> None:
    views = logitcache.ViewDataset(Plain([(torch.zeros(2), 0)] * 3, length=5), logitcache.ViewPlan())

    with pytest.raises(UnreadableSample, match=r"dataset\[3\] raises IndexError .* length is 5.*Make `__len__` the"):
        list(views)


# What a dataset gives


@pytest.mark.parametrize("given", ["attribute", "samples"])
def test_class_names_as_targets_say_how_to_number_them(given: str) -> None:
    names = ["cat", "dog", "cat"]
    dataset = Plain([(torch.zeros(2), name) for name in names])
    if given == "attribute":
        dataset.targets = names  # type: ignore[attr-defined]

    with pytest.raises(UsageError, match=r"targets are names, the first one 'cat'.*sorted\(set\(targets\)\)"):
        logitcache.sample_table(dataset)


def test_one_number_as_targets_says_how_many_are_expected() -> None:
    with pytest.raises(UsageError, match="targets must be 3 integer class numbers"):
        logitcache.sample_table(Plain([(torch.zeros(2), 0)] * 3, targets=7))


def test_a_row_that_is_a_mapping_says_to_wrap_the_dataset() -> None:
    views = logitcache.ViewDataset(Plain([{"text": "a", "label": 0}]), logitcache.ViewPlan())

    with pytest.raises(UsageError, match=r"must give \(input, target\), not a mapping of 'text', 'label'; wrap"):
        views[0]


ARRAY = (np.zeros((8, 8, 3), dtype=np.uint8), 0)


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (build_transform({"RandomCrop": {"size": 4}}), "RandomCrop"),
        (build_transform(["ToImage", {"RandomCrop": {"size": 4}}]), None),
        (v2.RandomHorizontalFlip(), "RandomHorizontalFlip"),
        (v2.Compose([v2.RandomApply([v2.ColorJitter()]), v2.ToImage()]), "ColorJitter"),
        (v2.Compose([v2.ToImage(), v2.RandomCrop(4)]), None),
        (v2.Compose([v2.Lambda(np.copy), v2.ToImage()]), None),
    ],
    ids=["crop", "converted", "flip", "nested", "converted nest", "lambda"],
)
def test_arrays_that_torchvision_would_leave_unchanged_are_refused(transform: Any, named: str | None) -> None:
    views = logitcache.ViewDataset(Plain([ARRAY]), logitcache.ViewPlan(transform=transform))

    if named is None:
        assert 3 == len(views[0][1])
        return
    with pytest.raises(UsageError, match=rf"torchvision's {named} returns a NumPy array .*unchanged. Put `ToImage`"):
        views[0]


def test_float_arrays_in_a_models_own_part_are_refused_too() -> None:
    views = logitcache.ViewDataset(
        Plain([(np.zeros((3, 8, 8), dtype=np.float32), 0)]),
        logitcache.ViewPlan(preprocess=build_transform({"Normalize": {"mean": [0.5], "std": [0.5]}})),
    )

    with pytest.raises(UsageError, match="torchvision's Normalize returns a NumPy array"):
        views[0]


def test_float_arrays_are_mixed_as_tensors() -> None:
    dataset = Plain([(np.full((1, 4, 4), value, dtype=np.float32), 0) for value in (0, 1)])
    plan = logitcache.ViewPlan(mixing=logitcache.Mixing(mixup=1.0), num_classes=2)

    assert 0 < float(logitcache.ViewDataset(dataset, plan)[0][1].mean()) < 1


# What a teacher returns


@pytest.mark.parametrize(
    ("model", "found"),
    [("tests.models:TwoHeads", "a mapping of 'digit', 'parity'"), ("tests.texts:Pair", "a tuple of 2")],
    ids=["mapping", "tuple"],
)
def test_a_teacher_that_returns_no_tensor_says_how_to_name_its_logits(tiny: Make, model: str, found: str) -> None:
    pipeline = tiny(*PICTURES, f"teacher.model={model}", "teacher.args={}")

    with pytest.raises(
        ShapeError, match=rf"returns {found}; expected a tensor of logits .*`cache.outputs` \(logits: MOD"
    ):
        cache_teacher(pipeline)


@pytest.mark.parametrize("logits", [{"logits": torch.zeros(4, 3)}, (torch.zeros(4, 3), None)], ids=["mapping", "tuple"])
def test_a_writer_that_gets_no_tensor_says_what_to_pass(tmp_path: Path, logits: Any) -> None:
    writer = logitcache.create(tmp_path / "a.cache", num_samples=4, num_classes=3, teacher="mine", dataset="none")

    with pytest.raises(ShapeError, match=r"logits are a (dict|tuple); expected one tensor .*such as `output.logits`"):
        writer.write(view=0, start=0, logits=logits)
    writer.close()


# S3


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """An S3 server with one answer, and no settings but those of the test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"" if self.command == "HEAD" else answer["body"].encode()
            self.send_response(answer["status"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")

    def answers(status: int, code: str, more: str = "", **settings: str) -> None:
        answer.update(status=status, body=f"<Error><Code>{code}</Code><Message>no</Message>{more}</Error>")
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


SIGNED = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.mark.parametrize(
    ("status", "code", "more", "settings", "remedy"),
    [
        (403, "AccessDenied", "", {}, "no credentials are set: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PR"),
        (403, "AccessDenied", "", SIGNED, r"these credentials \(AWS_ACCESS_KEY_ID or AWS_PROFILE\) lack permission"),
        (403, "InvalidAccessKeyId", "", SIGNED, r"unknown access key at http://127.* check AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "", SIGNED, "the secret key is wrong; check AWS_SECRET_ACCESS_KEY"),
        (400, "AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>", SIGNED, r"set AWS_REGION to eu-west-1 \(now not set"),
        (301, "PermanentRedirect", "", SIGNED | {"AWS_REGION": "us-west-2"}, r"bucket's region \(now us-west-2\)"),
        (400, "ExpiredToken", "", SIGNED, "credentials have expired: log in again, or set a new AWS_SESSION_TOKEN"),
        (404, "NoSuchBucket", "", SIGNED, r"no such bucket at http://127.*AWS_ENDPOINT_URL.*check its name in the URL"),
    ],
    ids=["no credentials", "no right", "unknown key", "wrong secret", "region", "redirect", "expired", "bucket"],
)  # fmt: skip
def test_s3_says_which_setting_is_missing(
    s3: Callable[..., None], status: int, code: str, more: str, settings: dict[str, str], remedy: str
) -> None:
    s3(status, code, more, **settings)

    with pytest.raises(StorageError, match=remedy):
        open_storage("s3://team/a.cache").get("manifest.json")


def test_s3_without_an_answer_says_which_endpoint_was_asked(
    s3: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3(200, "", **SIGNED)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with pytest.raises(StorageError, match="no response from http://127.0.0.1:9: check AWS_ENDPOINT_URL"):
        open_storage("s3://team/a.cache").get("manifest.json")


@pytest.mark.parametrize(("there", "missing"), [tuple(SIGNED), tuple(SIGNED)[::-1]], ids=["secret", "key"])
def test_one_of_two_s3_keys_names_the_other(
    s3: Callable[..., None], monkeypatch: pytest.MonkeyPatch, there: str, missing: str
) -> None:
    monkeypatch.setenv(there, "x")

    with pytest.raises(UsageError, match=rf"{there} is set, but {missing} is not; set both, or AWS_PROFILE instead"):
        open_storage("s3://team/a.cache")
