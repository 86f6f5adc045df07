"""The Llama 3 8B recipes, narrow: transformers loads and runs what they make, as it does a model rearranged by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from tests.support.models import llama, write_checkpoint, write_tokenizer
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"
MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the model stands under its name: Llama 3 8B's 32 layers, narrow."""
    directory = tmp_path_factory.mktemp("hub")
    narrow = llama(layers=32, hidden=32, intermediate=64, heads=4, kv_heads=2, vocabulary=64)
    write_tokenizer(write_checkpoint(directory / MODEL, narrow, fill=3))
    return directory


def load(directory: Path) -> Any:
    """Load a model with transformers in float32, and check that no tensors are missing or unexpected."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval()


def by_hand(source: Any, order: list[int]) -> Any:
    """A copy of a model with these of its layers."""
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = len(order)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.model.embed_tokens.load_state_dict(source.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(source.model.norm.state_dict())
    model.lm_head.load_state_dict(source.lm_head.state_dict())
    for layer, number in zip(model.model.layers, order, strict=True):
        layer.load_state_dict(source.model.layers[number].state_dict())
    return model


@pytest.mark.parametrize("name", ["duplicated", "removed", "reordered"])
def test_it_runs_as_if_rearranged_by_hand(
    name: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hub)
    recipe = RECIPES / f"Llama-3-8B-{name}.yml"
    merge(recipe, tmp_path / "out", Options(device="cpu", threads=1))
    slices = yaml.safe_load(recipe.read_text())["slices"]
    order = [layer for part in slices for layer in range(*part["sources"][0]["layer_range"])]
    assert order != list(range(32))

    model, hand = load(tmp_path / "out"), by_hand(load(hub / MODEL), order)
    assert model.config.num_hidden_layers == len(order)
    tokens = torch.arange(3, 15).view(1, -1)
    with torch.no_grad():
        ours, theirs = (m(tokens, output_hidden_states=True) for m in (model, hand))
    assert len(ours.hidden_states) == len(order) + 1
    for layer, (one, other) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert torch.equal(one, other), f"after layer {layer}"
        assert one.isfinite().all()
    assert torch.equal(ours.logits, theirs.logits)

    told = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(tokens, **told)
    assert torch.equal(written, hand.generate(tokens, **told))
    assert written.shape == (1, 20)
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").decode(written[0])
    assert text.startswith("word3 word4")
