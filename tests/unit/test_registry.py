"""Names: built in, from installed packages, or from the user's own code."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import logitcache
from logitcache.data.transforms import build_transform
from logitcache.encodings import ENCODINGS, Dense
from logitcache.errors import UntrustedCode, UsageError
from logitcache.registry import Package, Registry, offered
from logitcache.storage import open_storage
from logitcache.train.tracking import load_tracker


class Shape:
    name = "shape"


class Circle(Shape):
    name = "circle"


def registry(**changes: Any) -> Registry[type[Shape]]:
    return Registry("shape", {"circle": Circle}, **({"base": Shape} | changes))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which packages can be installed."""
    monkeypatch.syspath_prepend(tmp_path)
    offered.cache_clear()
    yield tmp_path
    offered.cache_clear()
    for name in [name for name in sys.modules if name.startswith("made_up_")]:
        del sys.modules[name]


def install(site: Path, package: str, name: str, value: str = "made_up_shapes:Square") -> None:
    """A package that offers a shape, as pip leaves it."""
    info = site / f"{package}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[logitcache.shapes]\n{name} = {value}\n")


SQUARE = """
from tests.unit.test_registry import Shape

class Square(Shape):
    name = "square"

def square(): ...
"""


def test_a_package_adds_a_name(site: Path) -> None:
    install(site, "squares", "square")
    (site / "made_up_shapes.py").write_text(SQUARE)
    shapes = registry()

    assert ["circle", "square"] == list(shapes)
    assert "square" in shapes
    assert ("Square", "made_up_shapes") == (shapes["square"].__qualname__, shapes["square"].__module__)
    assert (None, Package("squares", "1.2")) == (shapes.package_of("circle"), shapes.package_of("square"))


def test_a_built_in_name_can_not_be_replaced(site: Path) -> None:
    install(site, "squares", "circle", "no_such_module:Square")

    assert Circle is registry()["circle"]
    assert registry().package_of("circle") is None


def test_a_name_that_logitcache_registers_can_not_be_replaced(site: Path) -> None:
    install(site, "other", "square", "no_such_module:Square")
    install(site, "logitcache", "square")
    (site / "made_up_shapes.py").write_text(SQUARE)

    assert "Square" == registry()["square"].__qualname__
    assert registry().package_of("square") is None


def test_a_name_of_two_packages_is_refused_and_both_are_named(site: Path) -> None:
    install(site, "squares", "square")
    install(site, "oblongs", "square")

    with pytest.raises(UsageError, match=r"shape 'square' is offered by several .*: oblongs 1.2 and squares 1.2\."):
        registry()["square"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("square", "no_such_module:Square", "No module named 'no_such_module'", id="no module"),
        pytest.param("square", "made_up_shapes:Sqare", "has no attribute 'Sqare'", id="no attribute"),
        pytest.param("square", "made_up_shapes:square", "square is not a subclass of Shape", id="function"),
        pytest.param(
            "quadrat", "made_up_shapes:Square", "`name` of made_up_shapes:Square must be 'quadrat'", id="name"
        ),
    ],
)
def test_a_wrong_entry_point_names_its_package(site: Path, name: str, value: str, message: str) -> None:
    install(site, "squares", name, value)
    (site / "made_up_shapes.py").write_text(SQUARE)

    with pytest.raises(UsageError, match=f"shape '{name}' of the package squares 1.2.*{message}"):
        registry()[name]


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        pytest.param({}, "cirle", "unknown shape 'cirle'; did you mean 'circle'? Expected one of: circle", id="near"),
        pytest.param({}, "knot", "unknown shape 'knot'; expected one of: circle", id="far"),
        pytest.param({}, "a.b:c", "unknown shape 'a.b:c'; expected one of: circle", id="code, not allowed"),
        pytest.param(
            {"allows_code": True}, "knot", "unknown shape 'knot'; expected package.module:function or one of", id="code"
        ),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(changes: dict[str, Any], name: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        registry(**changes).resolve(name, trust=True)


def test_code_of_others_is_loaded_only_where_it_is_trusted() -> None:
    shapes = registry(allows_code=True)

    with pytest.raises(UntrustedCode):
        shapes.resolve("subprocess:run", trust=False)
    assert Circle is shapes.resolve("tests.unit.test_registry:Circle", trust=False)


def test_an_encoding_that_no_reader_could_find_is_refused(tmp_path: Path) -> None:
    class Unregistered(Dense):
        name = "unregistered"

    with pytest.raises(UsageError, match=r"encoding 'unregistered' is not registered.*'logitcache\.encodings'"):
        logitcache.create(
            tmp_path / "a", num_samples=2, num_classes=3, num_views=1, encoding=Unregistered(), teacher="t", dataset="d"
        )
    assert "unregistered" not in ENCODINGS


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        pytest.param(lambda: build_transform("invertt"), "unknown transform 'invertt'; did you mean", id="transform"),
        pytest.param(lambda: open_storage("s4://a/b"), "unknown store 's4://'; did you mean 's3://'?", id="store"),
        pytest.param(
            lambda: load_tracker("wandbb", trust=True), "unknown tracker 'wandbb'; did you mean 'wandb'?", id="tracker"
        ),
    ],
)
def test_every_kind_has_the_same_message(configure: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        configure()


TRANSFORMS_OF_OTHERS = """
def fade(by):
    return lambda image: image * by
"""


def test_a_packages_transform_is_told_apart_by_its_source(site: Path) -> None:
    install(site, "fading", "fade", "made_up_transforms:fade")
    entries = site / "fading-1.2.dist-info" / "entry_points.txt"
    entries.write_text(
        "[logitcache.transforms]\nfade = made_up_transforms:fade\nRandomCrop = made_up_transforms:fade\n"
    )
    (site / "made_up_transforms.py").write_text(TRANSFORMS_OF_OTHERS)
    transform = build_transform([{"fade": {"by": 2}}])

    assert 6 == transform(3)
    assert re.fullmatch(r"fade@[0-9a-f]{16}", next(iter(transform.spec[0])))
    assert 6 == build_transform(transform.spec)(3)
    assert [{"RandomCrop": {"size": 2}}] == build_transform([{"RandomCrop": {"size": 2}}]).spec
