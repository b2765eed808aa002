"""The floors of the house, and what an import costs."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import logitcache

CHECKOUT = Path(__file__).parents[2]
PACKAGE = CHECKOUT / "logitcache"

FLOOR = {
    "errors": 0, "strict_json": 0, "digest": 0, "randomness": 0, "progress": 0, "devices": 0, "entry_points": 0, "markdown": 0,
    "arrays": 0, "checksums": 0, "registry": 0, "context": 0, "deprecation": 0, "targets": 0,
    "losses": 1, "encodings": 1, "data": 1, "storage": 1,
    "cache": 2,
    "share": 3, "catalog": 3, "testing": 3,
    "config": 4, "train": 4, "verify": 4,
    "engines": 5,
    "stages": 6,
    "integrations": 7,
    "extras": 8, "cli": 8,
    "__init__": 9, "__main__": 9,
}  # fmt: skip


@functools.cache
def modules() -> dict[Path, ast.Module]:
    """Every module of the package, parsed."""
    return {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def test_imports_only_go_down() -> None:
    for path, module in modules().items():
        importer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert importer in FLOOR, f"{importer} has no floor yet: give it one here"
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "logitcache":
                parts = node.module.split(".")[1:] or [alias.name for alias in node.names]
                imported = parts[0]
                assert FLOOR[imported] <= FLOOR[importer], f"{importer} reaches up to {imported}"


TAKES_PIPELINES = {"config", "stages", "cli"}
"""Configuration ends here: other packages take the objects that `config/build` makes from a pipeline."""


def test_no_function_or_attribute_outside_config_and_stages_takes_a_pipeline() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path, module in modules().items()
        if path.relative_to(PACKAGE).parts[0] not in TAKES_PIPELINES and "Pipeline" in annotated_names(module)
    }

    assert set() == found


def annotated_names(module: ast.Module) -> set[str]:
    """Every name in the annotations of parameters, results and attributes."""
    annotations: list[ast.expr | None] = []
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotations.append(node.returns)
        elif isinstance(node, ast.arg | ast.AnnAssign):
            annotations.append(node.annotation)
    return {
        name.id
        for annotation in annotations
        if annotation is not None
        for name in ast.walk(annotation)
        if isinstance(name, ast.Name)
    }


def test_no_tracked_text_file_has_conflict_markers() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    files = [CHECKOUT / name for name in listed.stdout.split("\0") if name]
    marker = re.compile(rb"^(?:<{7} |={7}\r?$|>{7} )", re.MULTILINE)
    found = [path.relative_to(CHECKOUT).as_posix() for path in files if path.is_file() and marker.search(text_of(path))]

    assert len(files) > 100
    assert [] == found


def text_of(path: Path) -> bytes:
    """The content of a text file; nothing of a binary one."""
    content = path.read_bytes()
    return b"" if b"\0" in content else content


def test_importing_logitcache_loads_nothing_heavy_beside_torch_and_zarr() -> None:
    """Neither the package nor losses and stages; the compiler alone would take as long as torch."""
    heavy = (
        "torch._dynamo",
        "torchvision",
        "transformers",
        "pandas",
        "scipy",
        "ray",
        "matplotlib",
        "plotly",
        "tensorboard",
        "sklearn",
        "typer",
        "albumentations",
        "timm",
        "lightning",
        "vl_convert",
        "jinja2",
        "PIL",
        "pyarrow",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "torchmetrics",
        "captum",
        "wandb",
        "mlflow",
        "huggingface_hub",
    )
    modules = "logitcache, logitcache.losses, logitcache.stages.cache_teacher, logitcache.stages.train_student"
    program = f"import sys, {modules}; print([name for name in {heavy!r} if name in sys.modules])"

    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_what_needs_no_torch_loads_none() -> None:
    """`info`, `ls`, `--help`: a tenth of a second rather than three."""
    program = "import sys, logitcache.cli, logitcache.cache.summary; print([n for n in ('torch', 'zarr') if n in sys.modules])"

    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_reading_a_pipeline_loads_no_torch_where_no_value_needs_it(tmp_path: Path) -> None:
    pipeline = {"name": "x", "data": {"name": "digits"}, "teacher": {"model": "mlp"}, "cache": {"path": "x.cache"}}
    program = f"""
import sys
from logitcache.config.schema import parse_pipeline
parse_pipeline({pipeline | {"students": [{"name": "a", "model": "mlp"}]}!r}, source="x")
print([name for name in ("torch", "zarr", "numcodecs") if name in sys.modules])
"""

    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_a_dry_run_refuses_an_invalid_file_without_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("data: {name: digits}\nteacher: {model: mlp}\ncache: {pth: x.cache}\n")
    program = """
import sys
import logitcache.cli
sys.argv = ["logitcache", "run", "--dry-run", "bad.yaml"]
try:
    logitcache.cli.main()
except SystemExit as leaving:
    print([leaving.code, *(name for name in ("torch", "zarr") if name in sys.modules)])
"""

    assert (
        subprocess.check_output(
            [sys.executable, "-c", program], text=True, cwd=tmp_path, stderr=subprocess.DEVNULL
        ).strip()
        == "[2]"
    )


def test_every_name_of_the_package_is_there_and_known_to_type_checkers() -> None:
    declared = {
        alias.asname
        for node in ast.walk(modules()[PACKAGE / "__init__.py"])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }

    assert declared == set(logitcache.__all__) == set(logitcache._HOMES)
    assert all(getattr(logitcache, name) is not None for name in logitcache.__all__)


def test_no_module_imports_itself_by_way_of_others() -> None:
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    names = {module_name(path) for path in modules()}
    for path in modules():
        sorter.add(module_name(path), *imported_modules(path, names))

    sorter.prepare()  # raises CycleError, which names the modules


def module_name(path: Path) -> str:
    return ".".join(["logitcache", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that importing one imports at once; imports within functions come later."""
    imported = set()
    for node in modules()[path].body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= names & known | ({node.module} if names - known else set())
    return imported & known
