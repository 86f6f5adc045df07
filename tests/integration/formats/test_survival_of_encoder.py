"""What rounding keeps of a published fine-tune of the real encoder, compared with float64 computed from the files."""

from __future__ import annotations

from pathlib import Path

import pytest

import mergeloom
from tests.support.models.encoder import encoder_dir, fine_tuned_encoder_dir
from tests.support.outputs import read_model
from tests.support.survival.fp8_encoder import SIZE, WRITERS, write_fp8_encoder
from tests.support.survival.shares import bounded_share, decoded

WEIGHTS = (0.1, 0.3, 1.0)


@pytest.mark.parametrize("writer", WRITERS)
def test_shares_of_the_fine_tune_are_those_of_float64(writer: str, tmp_path: Path) -> None:
    base = write_fp8_encoder(tmp_path / "base", writer)
    block = None if "rows" in writer else (SIZE, SIZE)
    values, fine_tuned = decoded(read_model(base), block), read_model(fine_tuned_encoder_dir())
    for weight in WEIGHTS:
        entries = [{"model": str(fine_tuned_encoder_dir()), "parameters": {"weight": weight}}]
        recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries}
        result = mergeloom.merge(recipe, tmp_path / f"out{weight}")
        stored = decoded(read_model(tmp_path / f"out{weight}"), block)
        totals: dict[str, list[float]] = {}
        assert len(result.shares) == 36
        for each in result.shares:
            name = each.tensor
            wanted, bound = bounded_share(stored[name], values[name], fine_tuned[name], weight)
            assert abs(each.share - wanted) <= bound < 1e-4, name
            change = float((weight * (fine_tuned[name].double() - values[name])).square().sum())
            group = totals.setdefault("attention" if ".attention." in name else "MLP", [0.0, 0.0])
            group[0] += wanted * change
            group[1] += change
        groups = result.to_dict()["measured"]["survival"]["groups"]
        assert groups == {group: pytest.approx(kept / change, abs=1e-4) for group, (kept, change) in totals.items()}


def test_both_writers_of_blocks_agree_and_the_encoder_is_real(tmp_path: Path) -> None:
    first, second = (write_fp8_encoder(tmp_path / writer, writer) for writer in ("mergeloom", "torch"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    values, plain = decoded(read_model(first), (SIZE, SIZE)), read_model(encoder_dir())
    assert values.keys() >= plain.keys()
    for name, value in plain.items():
        assert (values[name] - value).abs().max() <= value.abs().max() * 2.0**-4
