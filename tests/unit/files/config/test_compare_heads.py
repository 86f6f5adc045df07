"""Classes with other labels, and embeddings that are pooled differently, are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.model.warnings import ModelWarningKind
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support.models import write_checkpoint
from tests.support.plans import linear

CPU = Options(device="cpu", threads=1)
CONFIG = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "num_hidden_layers": 2}
TENSORS = {
    "bert.embeddings.word_embeddings.weight": (8, 4),
    **{f"bert.encoder.layer.{n}.attention.self.query.weight": (4, 4) for n in range(2)},
    "classifier.weight": (2, 4),
    "classifier.bias": (2,),
}
GOOD = {"0": "NEGATIVE", "1": "POSITIVE"}
REVERSED = {"0": "POSITIVE", "1": "NEGATIVE"}


def warnings(tmp_path: Path, configs: list[dict[str, Any]], **more: Any) -> list[str]:
    """The warnings about models with these keys in config.json, named m0, m1, ..."""
    paths = [
        write_checkpoint(tmp_path / f"m{number}", TENSORS, config=CONFIG | config, fill=None)
        for number, config in enumerate(configs)
    ]
    return found_in(linear(*paths, **more), tmp_path)


def found_in(recipe: dict[str, Any], tmp_path: Path) -> list[str]:
    findings = plan(recipe, CPU).findings
    return [
        str(warning).replace(f"{tmp_path}/", "")
        for warning in findings
        if warning.kind is ModelWarningKind.CONFIG_DIFFERS
    ]


def test_classifiers_with_reversed_labels(tmp_path: Path) -> None:
    (text,) = warnings(tmp_path, [{"id2label": GOOD}, {"id2label": REVERSED}])
    assert text == (
        "id2label: class 0 is NEGATIVE in m0 and POSITIVE in m1, and these rows of classifier.bias are merged; merge "
        "models with the same classes in the same order, or take what follows the layers from one model with norm "
        "under non_layer"
    )
    (text,) = warnings(tmp_path, [{"id2label": GOOD}, {"label2id": {"POSITIVE": 0, "NEGATIVE": 1}}])
    assert "class 0 is NEGATIVE in m0 and POSITIVE in m1" in text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"id2label": GOOD}, {"id2label": GOOD}),
        ({"id2label": GOOD}, {"id2label": {"0": "negative", "1": "positive"}}),
        ({"id2label": GOOD}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}),
        ({"id2label": GOOD}, {}),
        ({"id2label": GOOD}, {"id2label": REVERSED, "architectures": ["BertModel"]}),
    ],
)
def test_labels_that_agree_or_say_nothing(first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    assert warnings(tmp_path, [first, second]) == []


def test_a_classifier_that_is_not_merged(tmp_path: Path) -> None:
    head = {"non_layer": {"norm": str(tmp_path / "m0")}}
    assert warnings(tmp_path, [{"id2label": GOOD}, {"id2label": REVERSED}], **head) == []


def old(*modes: str) -> dict[str, Any]:
    """The pooling config of older versions of sentence-transformers."""
    known = ("cls_token", "mean_tokens", "max_tokens")
    return {"word_embedding_dimension": 4} | {f"pooling_mode_{mode}": mode in modes for mode in known}


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (old("cls_token"), old("mean_tokens"), "cls in m0 and mean in m1"),
        (old("mean_tokens", "cls_token"), {"pooling_mode": "mean"}, "cls + mean in m0 and mean in m1"),
        (old("mean_tokens"), {"pooling_mode": "mean"}, None),
        (old("mean_tokens", "cls_token"), {"pooling_mode": ["cls", "mean"]}, None),
        (old("mean_tokens"), None, None),
    ],
)
def test_the_pooling_of_embeddings(first: dict[str, Any], second: Any, says: str | None, tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / f"m{n}", TENSORS, config=CONFIG, fill=None) for n in range(2)]
    for path, config in zip(paths, (first, second), strict=True):
        (path / "1_Pooling").mkdir()
        if config is not None:
            (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    found = found_in(linear(*paths), tmp_path)
    if says is None:
        assert found == []
    else:
        (text,) = found
        assert text.startswith(f"the pooling of token embeddings differs between the models: {says} (1_Pooling/config")
