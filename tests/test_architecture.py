"""The import arrows of DESIGN.md: each folder imports only what stands in its row."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from calibatt.methods.catalogue import METHODS

ROOT = Path(__file__).resolve().parent.parent

ARROWS = {
    "kernels": set(),
    "methods": {"kernels"},
    "models": {"methods", "kernels"},
    "calibration": {"models", "methods", "kernels"},
    "bench": {"calibration", "models", "methods", "kernels"},
    "reports": {"bench.machine", "bench.record", "bench.statistics"},
}
# pytest's command line for the benchmark, which ends with the gate's verdict
OF_FILES = {"bench/conftest.py": {"reports.gate", "reports.tables"}}
# heavy or optional packages that importing a module must not load
# (torch itself loads NVML's bindings where they are installed)
LAZY = ("diffusers", "transformers", "matplotlib", "skimage", "imageio", "jinja2", "optuna")


def _imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, without the leading `calibatt.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.removeprefix("calibatt.") for name in names if name.startswith("calibatt.")}
    return found


@pytest.mark.parametrize("folder", ARROWS)
def test_a_folder_imports_only_what_stands_above_it(folder: str) -> None:
    allowed = {folder, *ARROWS[folder]}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in sorted(_imports(path))
        if not any(
            name == one or name.startswith(f"{one}.")
            for one in allowed | OF_FILES.get(str(path.relative_to(ROOT)), set())
        )
    ]
    assert not wrong


# orders of tokens that the kernel suite times are methods' own; the control keeps as much as CalibAtt does; SVG-EAR has
# the clusters of Sparse VideoGen 2
SHARED = {
    "sta": {"bench/permutation.py"},
    "svg": {"bench/permutation.py"},
    "svg2": {"methods/ear.py"},
    "calibatt": {"methods/random_mask.py"},
}


def test_a_method_is_one_module_one_line_of_the_catalogue_and_tests_alone() -> None:
    """A module is a file, or a folder where it takes several."""
    modules = {method.__module__.removeprefix("calibatt.methods.").partition(".")[0] for method in METHODS.values()}
    assert {"random_mask", "calibatt"} <= modules
    for module in modules:
        importers = {
            str(path.relative_to(ROOT))
            for folder in (*ARROWS, "calibatt")
            for path in (ROOT / folder).rglob("*.py")
            if ROOT / "methods" / module not in path.parents
            and any(name == f"methods.{module}" or name.startswith(f"methods.{module}.") for name in _imports(path))
        }
        assert importers - SHARED.get(module, set()) == {"methods/catalogue.py"}
    named = (ROOT / "methods" / "catalogue.py").read_text(encoding="utf-8").split()
    # the import, and the line of the mapping
    assert [word for word in named if word.startswith("RandomMask")] == ["RandomMask", "RandomMask,"]


def test_every_folder_of_code_has_its_row() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == {*ARROWS, "calibatt"}


def test_importing_everything_loads_no_heavy_package() -> None:
    modules = [
        "calibatt." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ARROWS
        for path in sorted((ROOT / folder).rglob("*.py"))
        # the embedded model is made of Diffusers' classes; pytest's own files are not for import
        if path.name not in ("__init__.py", "conftest.py")
        and not path.name.startswith("test_")
        and "shapes" not in path.parts
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {LAZY!r} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert shown.stdout.strip() == "[]"


def test_reports_do_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['jaxtyping'] = None\n"
        "import calibatt, calibatt.cli, calibatt.reports.page, calibatt.reports.gate, calibatt.reports.figures"
    )
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True)
