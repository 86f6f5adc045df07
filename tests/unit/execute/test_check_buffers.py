"""Buffers that differ between models: shapes in the plan, values before the merge, errors in strict mode."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeloom.engine.model.warnings import ModelWarning, ModelWarningKind
from mergeloom.engine.run.merge import Result, merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.models import encoder_dir, perturbed_encoder, write_checkpoint
from tests.support.outputs import read_model

CPU = Options(device="cpu", threads=1)
STRICT = Options(device="cpu", threads=1, strict=True)
IDS = "embeddings.position_ids"
FREQUENCIES = "layers.{}.rotary_emb.inv_freq"
RANGE = torch.arange(16).unsqueeze(0)


def write(directory: Path, **models: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write models with a weight and these buffers, and return a recipe for their mean."""
    for name, buffers in models.items():
        write_checkpoint(directory / name, {"proj.weight": torch.ones(4, 4), **buffers}, config={"num_labels": 2})
    listed = [{"model": str(directory / name)} for name in models]
    return {"merge_method": "linear", "models": listed, "parameters": {"weight": 1}}


def merged(recipe: Any, out: Path | None, options: Options = CPU) -> tuple[Result, list[str]]:
    """Merge a recipe that the plan has no objections to; returns the warnings, too."""
    texts: list[str] = []
    planned = plan(recipe, options)
    assert planned.findings == ()
    return merge(planned, out, warn=texts.append), texts


@pytest.mark.parametrize("rehearsal", [False, True])
def test_buffers_that_differ(rehearsal: bool, tmp_path: Path) -> None:
    other = RANGE.clone()
    other[0, 5] = 7
    recipe = write(tmp_path, a={IDS: RANGE}, b={IDS: other})
    result, texts = merged(recipe, None if rehearsal else tmp_path / "out")
    a, b = tmp_path / "a", tmp_path / "b"
    assert texts == [
        f"buffer {IDS} at 5 is 5 in {a} and 7 in {b}: that of {a} is used; if another model has the right one, make it "
        "the `base_model`"
    ]
    assert result.measured.bytes_checked == 3 * 16 * 8  # the first one is read twice
    assert result.plan.to_dict()["buffers_checked"] == 1
    if not rehearsal:
        assert read_model(tmp_path / "out")[IDS].equal(RANGE)


def test_strict_mode_stops_before_anything_is_written(tmp_path: Path) -> None:
    recipe = write(tmp_path, a={IDS: RANGE}, b={IDS: RANGE + 1})
    with pytest.raises(CheckpointError, match=r"1 warning, which strict mode treats as errors:\n  buffer .* at 0 is 0"):
        merged(recipe, tmp_path / "out", STRICT)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="strict mode"):
        merged(recipe, None, STRICT)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (RANGE.float() * 0.5, "position 1 is 0.5"),
        (torch.cat([RANGE[:, :8], RANGE[:, :8]], 1), "position 8 is 0"),
        ((RANGE + 2), "position 0 is 2"),
        (RANGE.bfloat16() + 0.5, "position 0 is 0.5"),
    ],
)
def test_position_ids_are_consecutive(ids: torch.Tensor, text: str, tmp_path: Path) -> None:
    for models in ({"a": {IDS: ids}}, {"a": {IDS: ids}, "b": {IDS: ids}}):
        recipe = write(tmp_path, **models)
        _, texts = merged(recipe, None)
        assert texts == [
            f"buffer {IDS} of {tmp_path / 'a'} should be 0 to 15: {text}; it was probably averaged or edited by "
            "another tool: use a model with the original buffer"
        ]


def test_buffers_of_several_layers_share_a_warning(tmp_path: Path) -> None:
    first = {FREQUENCIES.format(layer): torch.tensor([1.0, 0.1]) for layer in range(3)}
    second = {name: value * 2 for name, value in first.items()}
    _, texts = merged(write(tmp_path, a=first, b=second), None)
    (text,) = texts
    assert text.startswith(f"buffer {FREQUENCIES.format(0)} at 0 is 1 in {tmp_path / 'a'} and 2 in {tmp_path / 'b'} (")
    assert f"({FREQUENCIES.format(1)}, {FREQUENCIES.format(2)} too): that of" in text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.tensor([1.0, 0.1, 1 / 3]), torch.tensor([1.0, 0.1, 1 / 3]).bfloat16()),
        (torch.tensor([1.0, 0.1, 1 / 3]).half(), torch.tensor([1.0, 0.1, 1 / 3]).bfloat16()),
        (torch.tensor([0.1]), torch.nextafter(torch.tensor([0.1]), torch.tensor([1.0]))),
        (torch.tensor([-math.inf, 0.0]), torch.tensor([-math.inf, 0.0]).double()),
        (torch.tensor([True, False]), torch.tensor([1, 0], dtype=torch.uint8)),
        (torch.tensor([1, 0]), torch.tensor([1, 0], dtype=torch.int32)),
        (torch.zeros(100_000, dtype=torch.bool), torch.zeros(100_000, dtype=torch.int16)),
    ],
)
def test_equal_values_in_other_dtypes_cause_no_warning(
    first: torch.Tensor, second: torch.Tensor, tmp_path: Path
) -> None:
    recipe = write(tmp_path, a={"attn_mask": first}, b={"attn_mask": second})
    assert merged(recipe, tmp_path / "out", STRICT)[1] == []


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (torch.tensor([1.0, 0.1]), torch.tensor([1.0, 0.11]), "at 1 is 0.1 in"),
        (torch.tensor([1.0, 0.1]), torch.tensor([1.0, 0.12]).bfloat16(), "at 1 is 0.1 in"),
        (torch.tensor([-1e4]), torch.tensor([-math.inf]), "at 0 is -10000 in"),
        (torch.tensor([True, False]), torch.tensor([1, 1], dtype=torch.uint8), "at 1 is 0 in"),
        (torch.zeros(100_000), torch.zeros(100_000).index_fill(0, torch.tensor([77_777]), 1), "at 77777 is 0 in"),
    ],
)
def test_values_that_differ(first: torch.Tensor, second: torch.Tensor, text: str, tmp_path: Path) -> None:
    recipe = write(tmp_path, a={"attn_mask": first}, b={"attn_mask": second})
    _, texts = merged(recipe, None)
    assert [text in found for found in texts] == [True]


def test_shapes_that_differ_are_known_when_planning(tmp_path: Path) -> None:
    recipe = write(tmp_path, a={IDS: RANGE}, b={IDS: torch.arange(32).unsqueeze(0)})
    (finding,) = plan(recipe, CPU).findings
    assert isinstance(finding, ModelWarning)
    assert finding.kind is ModelWarningKind.BUFFER
    assert finding.names == (IDS,)
    a, b = tmp_path / "a", tmp_path / "b"
    assert str(finding).startswith(f"buffer {IDS} has shape [1, 16] in {a} and [1, 32] in {b}: that of {a} is used; ")


def test_stages_are_compared_with_the_files(tmp_path: Path) -> None:
    write(tmp_path, a={IDS: RANGE}, b={IDS: RANGE}, c={IDS: RANGE + 1})
    first = {"name": "mean", **write(tmp_path, a={IDS: RANGE}, b={IDS: RANGE})}
    models = [{"model": "mean"}, {"model": str(tmp_path / "c")}]
    recipe = [first, {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}]
    _, texts = merged(recipe, None)
    assert [text.partition(":")[0] for text in texts] == [
        f"buffer {IDS} at 0 is 0 in {tmp_path / 'a'} and 1 in {tmp_path / 'c'}"
    ]


def test_real_fine_tunes_and_counters_cause_no_warning(tmp_path: Path) -> None:
    fine_tune = perturbed_encoder(tmp_path / "fine-tune", 1)
    models = [{"model": str(model)} for model in (encoder_dir(), fine_tune)]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    assert merged(recipe, None, STRICT)[1] == []
    steps = {"norm.num_batches_tracked": torch.tensor(5)}, {"norm.num_batches_tracked": torch.tensor(9)}
    assert merged(write(tmp_path, a=steps[0], b=steps[1]), None, STRICT)[1] == []
