"""The package is the checkout, imports nothing eagerly, and keeps to its rooms."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenloom

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "attention", "pallas_kernels", "sharding", "serve", "adapt")
# What each room may import from; nothing imports serve.
ARROWS = {
    "pallas_kernels": set(),
    "attention": {"pallas_kernels"},
    "sharding": {"attention", "pallas_kernels"},
    "model": {"attention", "pallas_kernels"},
    "adapt": {"model", "attention"},
    "serve": {"model", "sharding", "attention", "pallas_kernels"},
}


def test_the_package_is_this_checkout():
    assert Path(tokenloom.__file__).resolve().parent == ROOT


def test_import_is_lazy():
    code = "import sys, tokenloom; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_refused_by_name():
    with pytest.raises(AttributeError, match=r"no 'LLMs'.*LLM"):
        _ = tokenloom.LLMs


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_go_one_way(room):
    for path in (ROOT / room).rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth + 1 and node.module:
                target = node.module.split(".")[0]
                assert target == room or target in ARROWS[room], f"{path}: imports {target}"


@pytest.mark.parametrize("name", ["scheduler", "pages", "sequence", "gang"])
def test_host_bookkeeping_has_no_arrays(name):
    imports = re.findall(r"^\s*(?:from|import)\s+(\S+)", (ROOT / f"serve/{name}.py").read_text(), re.M)
    assert not {"jax", "numpy"} & {module.split(".")[0] for module in imports}


def test_the_core_fits_in_one_reading():
    core = [ROOT / f"serve/{name}.py" for name in ("engine", "scheduler", "pages", "programs")]
    assert sum(len(path.read_text().splitlines()) for path in core) < 1000
