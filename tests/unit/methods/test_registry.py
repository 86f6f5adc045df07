"""User-defined methods from files and packages, registration, and the completeness of docs/methods.md."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergeloom.errors import UsageError
from mergeloom.methods import Array, Inputs, PerInput, add, merge_method, merge_methods, registry
from tests.support.methods.kernels import merge
from tests.support.paths import ROOT

DOCS = (ROOT / "docs" / "methods.md").read_text()
TASK_VECTOR_METHODS = re.findall(r"^## (\w+)$", DOCS.split("\n# Task vectors\n")[1].split("\n# ")[0], re.MULTILINE)

SMALL = '''
from mergeloom.methods import Array, Inputs, add, merge_method

@merge_method("{name}")
def method(t: Inputs, *, share: float = 1.0) -> Array:
    """Sum.

    Args:
        share: weight of each model.
    """
    return add([share * x for x in t.models])
'''


pytestmark = pytest.mark.usefixtures("forget_methods")


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SMALL.format(name="mine"))
    assert registry.load_methods(file) == ("mine",)
    assert registry.load_methods(str(file)) == ("mine",)
    assert merge_methods()["mine"].parameters[0].default == 1.0
    assert torch.equal(merge("mine", [torch.ones(3), torch.ones(3)], {"share": 0.5}), torch.ones(3))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "file not found"),
        ("x = 1", "registers no merge method"),
        ("1 / 0", "ZeroDivisionError"),
        ("def (", "SyntaxError"),
        (SMALL.format(name="linear"), "'linear' is already registered"),
        (SMALL.format(name="mine").replace("float", "str"), "must be a float, int or bool"),
        (SMALL.format(name="mine").replace("share: weight of each model.", ""), "does not describe 'share'"),
        (SMALL.format(name="mine").replace("*, ", ""), "keyword-only"),
        (SMALL.format(name="mine") + "1 / 0", "ZeroDivisionError"),
    ],
)
def test_files_with_mistakes(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        registry.load_methods(file)
    assert str(file) in str(caught.value)
    assert "mine" not in merge_methods()


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "methods_of_a_package.py").write_text(SMALL.format(name="packaged"))
    monkeypatch.syspath_prepend(str(tmp_path))
    point = importlib.metadata.EntryPoint("any", "methods_of_a_package", registry.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point] if group == registry.GROUP else [])
    assert registry.load_entry_points() == ("packaged",)
    assert registry.load_entry_points() == ("packaged",)
    assert "packaged" in merge_methods()


def test_examples_in_the_docs(tmp_path: Path) -> None:
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)):
        file = tmp_path / f"example_{number}.py"
        file.write_text(example)
        registry.load_methods(file)
    x = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 2.0, 2.5]), torch.tensor([0.0, -3.0, 4.0])]
    assert merge("boldest", x, base=0).tolist() == [2.0, 2.0, 4.0]
    mean = merge("long_mean", x[:2])
    assert float(mean.norm()) == pytest.approx(float((x[0].norm() + x[1].norm()) / 2))
    inputs = [torch.randn(40_000) for _ in range(3)]
    for name in ("boldest", "long_mean"):
        assert torch.equal(merge(name, inputs, base=0), merge(name, inputs, base=0, tile_elements=1))
    lines = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[0].splitlines()
    assert len(lines[lines.index("") + 2 :]) == 5


def test_python_words_get_an_underscore() -> None:
    @merge_method("worded")
    def worded(t: Inputs, *, lambda_: float = 2.0, weight: PerInput[float]) -> Array:
        """A sum.

        Args:
            lambda_: factor of the sum.
            weight: weight of each model.
        """
        return add([lambda_ * w * x for w, x in zip(weight, t.models, strict=True)])

    found = {p.name: p for p in merge_methods()["worded"].parameters}
    assert found["lambda"].default == 2.0
    assert found["lambda"].argument == "lambda_"
    assert found["weight"].required
    assert found["weight"].per_input
    merged = merge("worded", [torch.ones(2), torch.ones(2)], {"lambda": 3.0, "weight": (1.0, 2.0)})
    assert merged.tolist() == [9.0, 9.0]


@pytest.mark.parametrize("name", sorted(merge_methods()))
def test_method_is_documented(name: str) -> None:
    match = re.search(rf"^## {name}$(.*?)(?=^#)", DOCS, re.MULTILINE | re.DOTALL)
    assert match, f"docs/methods.md has no section for {name}"
    text = match[1]
    if name in TASK_VECTOR_METHODS:
        text += DOCS.split("Parameters of all of them:")[1].split("\n#")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in text.splitlines() if line.startswith("| `")]
    described = {row[0].strip("`"): row for row in rows}
    method = merge_methods()[name]
    for parameter in method.parameters:
        assert parameter.name in described, f"docs/methods.md doesn't describe {name}'s {parameter.name}"
        _, per_model, default, accepted, *_ = described[parameter.name]
        assert accepted == parameter.values
        assert per_model == ("per model" if parameter.per_input else "")
        if parameter.required:
            assert default == "required"
        elif parameter.type is not bool:
            assert float(default) == parameter.default
        elif parameter.name not in ("normalize", "rescale"):  # whose defaults differ between methods of one table
            assert default == str(parameter.default).lower()
    if method.paper:
        assert method.paper in DOCS


def test_planning_with_a_method_does_not_import_torch() -> None:
    """Importing torch takes a second, and kernels are traced without it."""
    program = (
        "import sys; from mergeloom.methods import merge_methods; from mergeloom.methods.kernel.spec import InputSpec; "
        "dare = merge_methods()['dare_ties']; kernel = dare.kernel(InputSpec(2, 0, (4, 4)), {'weight': (0, 1)}); "
        "kernel.workspace(16, 4); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
