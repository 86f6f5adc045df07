"""No false alarms: real fine-tunes, and models that differ as published ones do, merge in strict mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support import models
from tests.support.published.other_families import FAMILIES
from tests.support.published.variants import write_model

STRICT = Options(device="cpu", threads=1, max_ram=4 << 30, strict=True)

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"parameters": {"weight": 0.5}},
    "slerp": {"parameters": {"t": [0, 0.5, 1]}},
    "ties": {"parameters": {"weight": 1, "density": 0.5}},
    "dare_ties": {"parameters": {"weight": 0.5, "density": 0.5}, "tokenizer_source": "base"},
    "arcee_fusion": {"tokenizer": {"source": "base"}},
}
LENIENT = replace(STRICT, strict=False)
LAYERS = {"Qwen3.5-4B": 4}
CHAT_ENDS = {"<|eot_id|>", "<end_of_turn>", "<|end|>"}
"""The end tokens of chats that an output with the base's files lacks."""
SAVED = sorted(set(FAMILIES) - {"Llama-3.2-3B-bnb-4bit", "Yi-34B"})
"""The families whose models are as they should be."""


def recipe(method: str, base: Path, other: Path, **more: Any) -> dict[str, Any]:
    """A merge of a model with its base, which is not listed unless the method has no base."""
    listed = [{"model": str(other)}]
    return {"merge_method": method, "base_model": str(base), "models": listed, **RECIPES[method], **more}


def warnings(content: dict[str, Any]) -> list[str]:
    """The warnings of a plan, which strict mode turns into an error."""
    return list(plan(content, STRICT).warnings)


def test_strict_mode_rejects_a_suspicious_model(pair: tuple[Path, Path]) -> None:
    """The other tests of this file can fail."""
    base, other = pair
    for path in pair:
        (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"strict mode treats as errors"):
        warnings(recipe("linear", base, other))


# ------------------------------------------------------------------------------------------------ real models


@pytest.mark.parametrize("swapped", [False, True], ids=["encoder first", "fine-tune first"])
@pytest.mark.parametrize("method", RECIPES)
def test_the_encoder_and_its_fine_tune(method: str, swapped: bool) -> None:
    pair = [models.encoder_dir(), models.fine_tuned_encoder_dir()]
    base, other = reversed(pair) if swapped else pair
    assert warnings(recipe(method, base, other, dtype="float32")) == []


def test_layers_of_the_encoder_and_its_fine_tune() -> None:
    parts = [(models.encoder_dir(), [0, 4]), (models.fine_tuned_encoder_dir(), [2, 6])]
    slices = [{"sources": [{"model": str(path), "layer_range": part}]} for path, part in parts]
    assert warnings({"merge_method": "passthrough", "slices": slices}) == []


# ------------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize("name", SAVED)
def test_a_family_is_real_and_its_fine_tunes_merge_without_a_warning(name: str, tmp_path: Path) -> None:
    family = replace(FAMILIES[name], layers=LAYERS.get(name, 2))
    paths = [write_model(family, tmp_path / str(tune), tune) for tune in range(4)]
    architecture = getattr(transformers, family.model().config["architectures"][0])
    _, info = architecture.from_pretrained(paths[0], output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert len(transformers.AutoTokenizer.from_pretrained(paths[0])) == family.vocabulary.size
    for method in ("linear", "ties", "dare_ties"):
        for tune, other in enumerate(paths[1:], 1):
            content = recipe(method, paths[0], other, dtype="bfloat16")
            if tune % 2 and CHAT_ENDS & set(family.vocabulary.also_end) and "tokenizer_source" not in content:
                (found,) = plan(content, LENIENT).warnings  # this one is true
                assert found.startswith("eos_token_id differs between the models: ")
                content["tokenizer_source"] = str(other)
            assert warnings(content) == [], (method, other.name)


# ------------------------------------------------------------------------------------------------ single differences

Change = Callable[[dict[str, Any]], object]


def saved_by_version_5(config: dict[str, Any]) -> None:
    """transformers 5 writes the rotary embedding's settings in a section, and dtype instead of torch_dtype."""
    rope = config.pop("rope_scaling") or {}
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default", **rope}
    config["dtype"] = config.pop("torch_dtype")
    config["transformers_version"] = "5.0.0"


def ends_of_chats(config: dict[str, Any]) -> None:
    end = config["eos_token_id"]
    config["eos_token_id"] = [end, end + 3, end + 4]


CONFIGS: dict[str, Change] = {
    "transformers_version": lambda c: c.update(transformers_version="4.57.6"),
    "torch_dtype": lambda c: c.update(torch_dtype="float16"),
    "dtype in the new key": lambda c: c.update(dtype=c.pop("torch_dtype")),
    "use_cache": lambda c: c.update(use_cache=False),
    "_name_or_path": lambda c: c.update(_name_or_path="meta-llama/Meta-Llama-3-8B"),
    "end tokens of chats": ends_of_chats,
    "transformers 5": saved_by_version_5,
    "defaults that an older version does not write": lambda c: [
        c.pop(key) for key in ("mlp_bias", "attention_dropout")
    ],
    "a default that a newer version writes": lambda c: c.update(head_dim=8),
    "an integer for a whole number": lambda c: c.update(rope_theta=500000),
    "the old name of the rotary embedding's type": lambda c: c.update(
        rope_scaling={key.replace("rope_type", "type"): value for key, value in c["rope_scaling"].items()}
    ),
    "null for an absent key": lambda c: c.update(pad_token_id=None),
    "dropout": lambda c: c.update(attention_dropout=0.1),
    "keys of a trainer": lambda c: c.update(unsloth_version="2024.9", unsloth_fixed=True, gradient_checkpointing=True),
    "keys of an inference server": lambda c: c.update(auto_map={}, quantization_config=None),
    "initializer_range": lambda c: c.update(initializer_range=0.01),
}
"""Changes of config.json that say nothing about the values of the tensors."""


def changed(path: Path, file: str, change: Change) -> None:
    """Change one of a model's JSON files."""
    content = json.loads((path / file).read_text())
    before = json.dumps(content)
    change(content)
    assert json.dumps(content) != before
    (path / file).write_text(json.dumps(content, indent=2))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A Llama 3.1 and a fine-tune whose files are equal but for the tensors."""
    family = replace(FAMILIES["Llama-3.1-8B"], layers=2)
    base, other = (write_model(family, tmp_path / name, tune) for name, tune in (("base", 0), ("other", 3)))
    for file in base.glob("*.json"):
        (other / file.name).write_text(file.read_text())
    return base, other


@pytest.mark.parametrize("method", ["linear", "dare_ties"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_difference_between_config_files(name: str, method: str, pair: tuple[Path, Path]) -> None:
    base, other = pair
    changed(other, "config.json", CONFIGS[name])
    for first, second in (pair, (other, base)):
        assert warnings(recipe(method, first, second, dtype="bfloat16")) == []


FILES: dict[str, tuple[str, Change]] = {
    "sampling": ("generation_config.json", lambda c: c.update(do_sample=True, temperature=0.6, top_p=0.9)),
    "version": ("generation_config.json", lambda c: c.update(transformers_version="4.57.6")),
    "a chat template": ("tokenizer_config.json", lambda c: c.update(chat_template="{{ messages }}")),
    "lengths": ("tokenizer_config.json", lambda c: c.update(model_max_length=131072, padding_side="left")),
    "the tokenizer's class": ("tokenizer_config.json", lambda c: c.update(tokenizer_class="TokenizersBackend")),
    "truncation": (
        "tokenizer.json",
        lambda c: c.update(
            truncation={"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
        ),
    ),
    "the tokenizer's processor": ("tokenizer.json", lambda c: c.update(post_processor=None, ignored=None)),
}
"""Changes of other files that leave the rows of the tokens as they are."""


@pytest.mark.parametrize("method", ["linear", "dare_ties"])
@pytest.mark.parametrize("name", FILES)
def test_a_difference_between_tokenizers_or_generation_configs(name: str, method: str, pair: tuple[Path, Path]) -> None:
    base, other = pair
    file, change = FILES[name]
    changed(other, file, change)
    for first, second in (pair, (other, base)):
        assert warnings(recipe(method, first, second, dtype="bfloat16")) == []


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_end_tokens_of_chats_in_one_generation_config(method: str, pair: tuple[Path, Path]) -> None:
    base, other = pair
    changed(other, "generation_config.json", ends_of_chats)
    assert warnings(recipe(method, other, base, dtype="bfloat16")) == []
    (found,) = plan(recipe(method, base, other, dtype="bfloat16"), LENIENT).warnings
    assert found.startswith(f"eos_token_id differs between the models: 301 in {base}, 301 or 304 or 305 in {other}; ")
    for chosen in pair:
        assert warnings(recipe(method, base, other, dtype="bfloat16", tokenizer_source=str(chosen))) == []


@pytest.mark.parametrize("file", ["generation_config.json", "special_tokens_map.json"])
def test_a_file_that_only_one_model_has(file: str, pair: tuple[Path, Path]) -> None:
    (pair[1] / file).unlink()
    for first, second in (pair, pair[::-1]):
        assert warnings(recipe("ties", first, second, dtype="bfloat16")) == []
