"""A method in a package of one's own, installed from outside: checked, listed, measured and used by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import calibatt.kernels.names as names
from calibatt.bench.cells import Arm
from calibatt.kernels.names import Catalogue, UnknownName, UnusableEntry, look_up
from calibatt.methods.catalogue import METHODS, build
from calibatt.testing import ContractBroken, check_method

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own-method.md").read_text(encoding="utf-8")
(SOURCE, _) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(ENTRY,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with the page's package in it, as pip would leave it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "pooled.py").write_text(SOURCE)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    points = ENTRY.replace('[project.entry-points."calibatt.methods"]', "[calibatt.methods]").replace('"', "")
    (info / "entry_points.txt").write_text(points)
    return tmp_path


def _run(package: Path, *command: str) -> str:
    path = os.pathsep.join((str(package), os.environ.get("PYTHONPATH", "")))
    # a benchmark refuses to be a worker of xdist, which this process may be
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**env, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_and_built_by_its_name(package: Path) -> None:
    assert "pooled" in _run(package, "-m", "calibatt", "methods")
    script = "import calibatt; print(calibatt.build('pooled', preset='sparse', block=(32, 16)).config)"
    assert _run(package, "-c", script) == "PooledConfig(density=0.2, block=(32, 16))\n"


@pytest.mark.slow
def test_it_passes_the_checks_and_is_measured_and_reported(package: Path, tmp_path: Path) -> None:
    script = "from calibatt.testing import check_method; print(*check_method('mine.pooled:Pooled'), sep='\\n')"
    assert _run(package, "-c", script).splitlines() == [
        f"mine.pooled:Pooled/{preset} passes 9 checks" for preset in ("default", "sparse")
    ]
    out = tmp_path / "bench.json"
    arms = "dense,mine.pooled:Pooled/sparse"
    _run(
        package, "-m", "pytest", "bench", "-q", "-k", "attention", "--methods", arms, "--steps", "2", "--rounds", "2",
        f"--benchmark-json={out}",
    )  # fmt: skip
    _run(package, "-m", "calibatt", "report", str(out), "-o", str(tmp_path / "report"))
    said = (tmp_path / "report" / "tables.md").read_text(encoding="utf-8")
    assert "| Pooled/sparse |" in said


@pytest.fixture
def importable(package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in this process, whose catalogue forgets it afterwards."""
    # found before the package is there
    monkeypatch.setattr(METHODS, "_offered", METHODS._offered)
    monkeypatch.setattr(METHODS, "_loaded", dict(METHODS._loaded))
    monkeypatch.syspath_prepend(package)
    return package


@pytest.mark.usefixtures("importable")
def test_a_class_that_is_given_by_its_module_has_its_own_name_from_then_on() -> None:
    assert str(Arm.parse("mine.pooled:Pooled/sparse=0.35", "default")) == "pooled/sparse=0.35"
    assert build("pooled").config.density == 0.5
    assert look_up(METHODS, "pooled", "method") is look_up(METHODS, "mine.pooled:Pooled", "method")


def test_a_check_that_fails_says_which_and_of_which_preset(importable: Path) -> None:
    module = importable / "forgetful.py"
    # draws from the generator that the video's noise is drawn from
    module.write_text(
        SOURCE.replace("scores = means[0] @ means[1].mT", "scores = torch.randn_like(means[0] @ means[1].mT)")
    )
    with pytest.raises(ContractBroken, match=r"Pooled/default: a plan is for its site: the plan drew"):
        check_method("forgetful:Pooled")


def test_a_look_that_no_figure_can_have_is_refused_before_anything_is_measured(importable: Path) -> None:
    (importable / "odd.py").write_text(SOURCE.replace('"X"', '"h"'))
    with pytest.raises(UnusableEntry, match=r"^odd:Pooled is no method: marker 'h' is none of o s \^ v"):
        Arm.parse("odd:Pooled", "default")


class _One:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize(
    ("offered", "asked", "said"),
    [
        ({"own": "os:path"}, "own", "calibatt and a package both have a thing 'own': uninstall one of them"),
        ({"new": "no_such_module:it"}, "new", "a package's thing 'new' cannot be loaded: ModuleNotFoundError"),
        ({"new": "os:path"}, "new", "a package's thing 'new' is no thing: it has no name"),
        ({"new": "os:environ"}, "newer", "unknown thing 'newer': did you mean new?"),
        ({}, "os:no_such", "os:no_such cannot be loaded: AttributeError"),
        ({}, "os:path", "os:path is no thing: it has no name"),
    ],
)
def test_what_another_package_offers_and_is_of_no_use_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, offered: dict[str, str], asked: str, said: str
) -> None:
    points = [EntryPoint(name=name, value=value, group="calibatt.things") for name, value in offered.items()]
    monkeypatch.setattr(names, "entry_points", lambda group: points)
    catalogue = Catalogue(
        "thing",
        (_One("own"),),
        fault=lambda found: None if isinstance(found, _One) or found is os.environ else "it has no name",
    )
    with pytest.raises((UnusableEntry, UnknownName)) as caught:
        look_up(catalogue, asked, "thing")
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
