"""Whose code runs without consent: the user's own modules in the working directory, and nothing that a cache names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import numpy as np
import pytest

import logitcache
from logitcache.cli.application import main
from logitcache.data.transforms import build_transform
from logitcache.data.views import ViewPlan
from logitcache.entry_points import load_entry_point
from logitcache.errors import UntrustedCode
from tests.contract.test_refusals import forge_manifest

CHECKOUT = str(Path(__file__).parents[2])


def loaded_in(folder: Path | str, *names: str, before: str = "") -> list[str]:
    """What becomes of entry points in a process of its own whose working directory is the given one."""
    program = f"""
        import sys
        sys.path.insert(0, {CHECKOUT!r})
        from logitcache.entry_points import load_entry_point
        from logitcache.errors import UntrustedCode
        {before}
        for name in {names!r}:
            try:
                load_entry_point(name, trust=False)
                print("loaded")
            except UntrustedCode:
                print("refused")
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


LIBRARY = ("os:system", "builtins:eval", "subprocess:run", "os.path:join", "posix:system", "zipimport:zipimporter")
"""Of the standard library, built in or frozen; loaded already or not."""


def test_no_working_directory_vouches_for_the_standard_library(tmp_path: Path) -> None:
    """Wherever one stands: in the root, above the interpreter, in its library, or in a project of one's own."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for folder in ("/", sys.base_prefix, Path(sys.base_prefix).parent, stdlib, stdlib.parent, tmp_path):
        assert ["refused"] * len(LIBRARY) == loaded_in(folder, *LIBRARY), folder


def test_a_module_named_as_one_of_the_library_is_refused(tmp_path: Path) -> None:
    """Which of the two is imported would depend on the program."""
    (tmp_path / "statistics.py").write_text("def mean(): ...\n")

    assert ["refused"] == loaded_in(tmp_path, "statistics:mean")


def test_a_folder_above_an_interpreter_does_not_vouch_for_what_is_installed_with_it(tmp_path: Path) -> None:
    """As from a home folder that Python was installed in."""
    installed = tmp_path / "python" / "share"
    installed.mkdir(parents=True)
    (installed / "tool.py").write_text("def run(): ...\n")
    names = ("python.share.tool:run",)

    assert ["loaded"] == loaded_in(tmp_path, *names)
    for prefix in ("prefix", "base_prefix", "exec_prefix", "base_exec_prefix"):
        assert ["refused"] == loaded_in(tmp_path, *names, before=f"sys.{prefix} = {str(tmp_path / 'python')!r}"), prefix


@pytest.mark.parametrize("mark", ["pyvenv.cfg", "conda-meta/history", "site-packages"])
def test_an_environment_in_the_project_is_not_the_users_own(tmp_path: Path, mark: str) -> None:
    folder = tmp_path / "env" / ("site-packages" if mark == "site-packages" else "lib")
    folder.mkdir(parents=True)
    (folder / "tool.py").write_text("def run(): ...\n")
    if mark != "site-packages":
        (tmp_path / "env" / mark).parent.mkdir(exist_ok=True)
        (tmp_path / "env" / mark).touch()

    assert ["refused"] == loaded_in(tmp_path, "tool:run", before=f"sys.path.append({str(folder)!r})")


def test_the_root_of_a_machine_is_nobodys_project(tmp_path: Path) -> None:
    """From there every file of every user could be named."""
    (tmp_path / "tool.py").write_text("def run(): ...\n")
    name = ".".join([*tmp_path.parts[1:], "tool"])
    if not all(part.isidentifier() for part in tmp_path.parts[1:]):  # pytest's folders have dashes
        link = Path("/tmp") / f"logitcache_{abs(hash(name))}"
        link.symlink_to(tmp_path)
        try:
            assert ["refused"] == loaded_in("/", f"tmp.{link.name}.tool:run")
        finally:
            link.unlink()
    else:
        assert ["refused"] == loaded_in("/", f"{name}:run")


@pytest.mark.parametrize("where", ["", "downloads", "downloads/more"])
def test_a_module_in_a_cache_is_not_the_users_own(tmp_path: Path, where: str) -> None:
    """A cache that was unpacked or cloned into the project may bring any file."""
    small_cache(tmp_path / "made")
    folder = tmp_path / "project" / where
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "tool.py").write_text("def run(): ...\n")
    name = ".".join([*Path(where).parts, "inner", "tool"]) + ":run"
    assert ["loaded"] == loaded_in(tmp_path / "project", name)

    shutil.copy(tmp_path / "made" / "manifest.json", folder)
    assert ["refused"] == loaded_in(tmp_path / "project", name)
    (folder / "manifest.json").write_text("{damaged")
    assert ["refused"] == loaded_in(tmp_path / "project", name)
    (folder / "manifest.json").write_text('{"name": "a web page"}')
    assert ["loaded"] == loaded_in(tmp_path / "project", name)


def test_a_function_that_an_own_module_imported_is_not_the_users_own(tmp_path: Path) -> None:
    """A project's modules import `subprocess.run`, and a stranger's pipeline could name it there."""
    (tmp_path / "tools.py").write_text(
        "import functools\nfrom builtins import eval\nfrom os import system\nfrom subprocess import Popen, run\n"
        "from parts import own\nhalf = functools.partial(own, 1)\ndef direct(): ...\n"
    )
    (tmp_path / "parts.py").write_text("def own(*a): ...\n")
    names = [f"tools:{name}" for name in ("eval", "system", "Popen", "run", "__class__", "own", "half", "direct")]

    assert ["refused"] * 5 + ["loaded"] * 3 == loaded_in(tmp_path, *names)


def test_other_callables_that_an_own_module_imported_are_refused_too(tmp_path: Path) -> None:
    """NumPy's functions are objects of a class of its own; a bound method and a partial lead to others' code."""
    (tmp_path / "tools.py").write_text(
        "import functools, os, subprocess\nfrom random import choice\nfrom numpy import savetxt\n"
        "run = functools.partial(subprocess.run, shell=True)\nget = os.environ.get\n"
        "class Own:\n    def __call__(self): ...\nmade = Own()\nmethod = made.__call__\n"
    )
    names = [f"tools:{name}" for name in ("choice", "savetxt", "run", "get", "Own", "made", "method")]

    assert ["refused"] * 4 + ["loaded"] * 3 == loaded_in(tmp_path, *names)


def test_a_working_directory_inside_a_cache_does_not_vouch_for_it(tmp_path: Path) -> None:
    with logitcache.create(
        tmp_path / "a.cache", num_samples=4, num_classes=3, teacher="net", dataset="pictures"
    ) as writer:
        writer.write(view=0, start=0, logits=np.eye(4, 3, dtype=np.float32) * 2)
    examples = tmp_path / "a.cache" / "examples"
    examples.mkdir()
    (examples / "tools.py").write_text("def run(): ...\n")

    assert ["refused"] == loaded_in(examples, "tools:run")


def test_an_imported_function_is_named_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_tools.py").write_text("from shutil import rmtree\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UntrustedCode, match=r"my_own_tools:rmtree is shutil\.rmtree, from outside the working directory"
    ):
        load_entry_point("my_own_tools:rmtree", trust=False)

    assert shutil.rmtree is load_entry_point("my_own_tools:rmtree", trust=True)


def test_a_package_that_was_imported_from_elsewhere_is_the_one_that_counts(tmp_path: Path) -> None:
    """A folder of the same name here says nothing of what would be imported."""
    for place in ("elsewhere", "project"):
        (tmp_path / place / "shared").mkdir(parents=True)
        (tmp_path / place / "shared" / "__init__.py").touch()
        (tmp_path / place / "shared" / "tool.py").write_text("def run(): ...\n")
    elsewhere = f"sys.path.insert(0, {str(tmp_path / 'elsewhere')!r})"

    assert ["loaded"] == loaded_in(tmp_path / "project", "shared.tool:run", before=elsewhere)
    assert ["refused"] == loaded_in(tmp_path / "project", "shared.tool:run", before=f"{elsewhere}; import shared")


def small_cache(path: Path, plan: ViewPlan | None = None) -> Path:
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    with logitcache.create(path, num_samples=6, num_classes=3, teacher="t", dataset="d", view_plan=plan) as writer:
        writer.write(view=0, start=0, logits=logits)
    return path


def test_code_that_a_cache_names_needs_consent_even_in_the_working_directory(tmp_path: Path) -> None:
    """All of it is listed, steps within steps too, and nothing is imported before."""
    plan = ViewPlan(transform=build_transform({"tests.models:shift": {"by": 1}}))
    path = small_cache(tmp_path / "a", plan)
    forge_manifest(
        path,
        lambda raw: raw["identity"]["transform"].update(
            shared=[*raw["identity"]["transform"]["shared"], {"RandomApply": {"transforms": ["tests.gone:away"]}}],
            teacher_input=[{"os:system": {"command": "true"}}],
        ),
    )
    with pytest.raises(UntrustedCode) as refused:
        _ = logitcache.open(path).view_plan
    message = str(refused.value)

    assert "tests.models:shift, tests.gone:away, os:system" in message
    assert "logitcache.open(..., trust=True)" in message
    assert "--trust" in message


def test_code_that_a_cache_names_runs_with_consent(tmp_path: Path) -> None:
    plan = ViewPlan(transform=build_transform({"tests.models:shift": {"by": 1}}))
    path = small_cache(tmp_path / "a", plan)

    assert plan.describe() == logitcache.open(path, trust=True).view_plan.describe()


def test_a_pipeline_that_names_the_same_code_vouches_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cache, verify and train without --trust: the pipeline's own transform is built, and compared with the cache's."""
    (tmp_path / "p.yaml").write_text(
        f"""
name: own
data: {{name: digits, validation: 0.1}}
views: {{count: 1, transform: [{{"tests.models:shift": {{by: 1}}}}]}}
teacher: {{model: mlp, args: {{hidden: [8]}}, weights: random}}
cache: {{path: {tmp_path}/own.cache, encoding: {{name: dense}}}}
train: {{epochs: 1, seeds: [0]}}
students: [{{name: small, model: mlp, args: {{hidden: [4]}}, loss: kl}}]
runs: {{path: {tmp_path}/runs}}
num_workers: 0
threads: 1
"""
    )
    pipeline = str(tmp_path / "p.yaml")
    for command in (
        ["cache-teacher", pipeline],
        ["verify", str(tmp_path / "own.cache"), "--data", pipeline],
        ["train-student", pipeline],
    ):
        monkeypatch.setattr(sys, "argv", ["logitcache", *command])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code, capsys.readouterr().err
    with pytest.raises(UntrustedCode):
        _ = logitcache.open(tmp_path / "own.cache").view_plan
