"""The notebooks run from top to bottom (their code cells, in one namespace)."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# What each notebook prints, at least.
PRINTED = {
    "first_steps.ipynb": ("class Stack:", "the prompt is empty"),
    "batch_job.ipynb": ("killed after", "every request once: True", "equal to the unkilled job: True"),
    "compose.ipynb": ("same samples: True", "tokens a step over", "leave one of them None"),
    "telemetry.ipynb": ("generated 384 tokens", "requests waited in", "same tokens: True", "picture: True"),
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_run(path, capsys):
    names: dict = {}
    cells = json.loads(path.read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    printed = capsys.readouterr().out
    assert all(text in printed for text in PRINTED[path.name]), printed
