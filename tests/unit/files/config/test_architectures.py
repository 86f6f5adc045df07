"""The tables about architectures agree with the configuration classes of the installed transformers."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

from mergeloom.engine.files.config import architectures


@cache
def defaults() -> dict[str, dict[str, object]]:
    """The defaults that the configuration classes state, by model type."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, dict[str, object]] = {}
    for path in sorted(Path(spec.origin).parent.glob("models/*/configuration_*.py")):
        classes: dict[str, dict[str, object]] = {}
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            stated: dict[str, object] = {}
            for base in node.bases:
                stated |= classes.get(getattr(base, "id", ""), {})
            for each in node.body:
                target = each.targets[0] if isinstance(each, ast.Assign) else getattr(each, "target", None)
                value = getattr(each, "value", None)
                if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                    stated[target.id] = value.value
            classes[node.name] = stated
            if isinstance(name := stated.get("model_type"), str):
                found[name] = stated
    return found


@pytest.mark.parametrize("table", ["TIED_BY_DEFAULT", "ATTENTION_BIAS", "MLP_BIAS"])
def test_the_tables_agree_with_transformers(table: str) -> None:
    types: frozenset[str] = getattr(architectures, table)
    known = {name: stated for name, stated in defaults().items() if "tie_word_embeddings" in stated}
    if not known:  # before transformers 5, the defaults are arguments of __init__
        assert defaults()
        return
    key = {"TIED_BY_DEFAULT": "tie_word_embeddings", "ATTENTION_BIAS": "attention_bias", "MLP_BIAS": "mlp_bias"}[table]
    installed = {name: defaults()[name] for name in types if name in defaults()}
    assert len(installed) > len(types) / 2
    if table == "TIED_BY_DEFAULT":
        assert [name for name, stated in installed.items() if stated.get(key) is False] == []
    else:
        assert [name for name, stated in installed.items() if key not in stated] == []
