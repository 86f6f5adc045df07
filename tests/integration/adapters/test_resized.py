"""Adapters whose model was resized for added tokens: values, vocabularies and files of `base+adapter`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from tests.support.adapters.files import PREFIX, product, read_adapter, write_lora
from tests.support.outputs import config_of, read_model
from tests.support.vocabularies.expected import EMBEDDING, HEAD
from tests.support.vocabularies.pairs import HIDDEN, byte_level, with_tokens, write_model

CPU = Options(device="cpu", threads=1)
NEW = ("<|think|>", "<|call|>", "<|end|>")
Q = "model.layers.0.self_attn.q_proj"
BASE_TOKENIZER = byte_level()
TOKENS = BASE_TOKENIZER.get_vocab_size()
ADAPTED = with_tokens(BASE_TOKENIZER, *NEW)


def tables(*names: str, rows: int = TOKENS + len(NEW), seed: int = 3) -> dict[str, Tensor]:
    """Embeddings and heads with a row for each token."""
    generator = torch.Generator().manual_seed(seed)
    return {f"{PREFIX}{name}": torch.randn(rows, HIDDEN, generator=generator) for name in names}


def write_base(directory: Path, *, tied: bool = False, dtype: str = "F32") -> Path:
    return write_model(directory / "base", BASE_TOKENIZER, 1, tied=tied, dtype=dtype)


def write_resized(
    directory: Path, more: dict[str, Tensor], tokenizer: Tokenizer | None = ADAPTED, **config: Any
) -> Path:
    """Write an adapter of an attention matrix with tables of its own, and with a tokenizer."""
    lora = write_lora(directory, {f"{Q}.weight": (HIDDEN, HIDDEN)}, targets=("q_proj",), more=more, **config)
    if tokenizer is not None:
        tokenizer.save(str(lora / "tokenizer.json"))
        content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (lora / "tokenizer_config.json").write_text(json.dumps(content))
    return lora


def passthrough(base: Path, adapter: Path) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}


def linear(*references: str, **more: Any) -> dict[str, Any]:
    entries = [{"model": each, "parameters": {"weight": 0.5}} for each in references]
    return {"merge_method": "linear", "parameters": {"normalize": False}, "models": entries, **more}


@pytest.mark.parametrize("tied", [False, True])
def test_passthrough_writes_a_model_that_loads_with_the_adapters_tokenizer(tmp_path: Path, tied: bool) -> None:
    base = write_base(tmp_path, tied=tied)
    own = tables(EMBEDDING) if tied else tables(EMBEDDING, HEAD)
    adapter = write_resized(tmp_path / "a", own)
    done = merge(passthrough(base, adapter), tmp_path / "out", CPU)
    made, before = read_model(tmp_path / "out"), read_model(base)
    assert (HEAD in made) == (not tied)
    for name, table in own.items():
        assert torch.equal(made[name.removeprefix(PREFIX)], table)
    wanted = before[f"{Q}.weight"].double() + product(adapter, Q)
    assert torch.allclose(made[f"{Q}.weight"].double(), wanted, rtol=1e-6, atol=1e-7)
    assert config_of(tmp_path / "out")["vocab_size"] == TOKENS + len(NEW)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    ids = loaded(NEW[1] + NEW[0], add_special_tokens=False)["input_ids"]
    assert ids == [TOKENS + 1, TOKENS]
    assert torch.equal(model.get_input_embeddings().weight[ids], own[f"{PREFIX}{EMBEDDING}"][ids])
    assert not any("vocab_size" in warning or "rows" in warning for warning in done.plan.warnings)


def test_without_a_tokenizer_of_the_adapter_new_rows_are_padding(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    adapter = write_resized(tmp_path / "a", tables(EMBEDDING, HEAD), None)
    done = merge(passthrough(base, adapter), tmp_path / "out", CPU)
    assert len(read_model(tmp_path / "out")[EMBEDDING]) == TOKENS + len(NEW)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    (warning,) = done.plan.warnings
    assert f"has {TOKENS + 3} rows, 3 more than that of the base, and the adapter has no tokenizer files" in warning
    union = plan(linear(str(base), f"{base}+{adapter}", base_model=str(base), tokenizer_source="union"), CPU)
    assert union.built.vocabulary is not None
    assert (union.built.vocabulary.tokens, union.built.vocabulary.rows) == (TOKENS, TOKENS + 3)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_union_of_base_and_adapter_merges_token_by_token(tmp_path: Path, tied: bool, dtype: str) -> None:
    """The base has no rows for the new tokens, so it uses the adapter's; all others are merged."""
    base = write_base(tmp_path, tied=tied, dtype=dtype)
    own = tables(EMBEDDING) if tied else tables(EMBEDDING, HEAD)
    adapter = write_resized(tmp_path / "a", own)
    recipe = linear(str(base), f"{base}+{adapter}", base_model=str(base), tokenizer_source="union")
    done = merge(recipe, tmp_path / "out", CPU)
    made, before = read_model(tmp_path / "out"), read_model(base)
    exact = {"F32": 1e-6, "BF16": 2**-8}[dtype]
    for stored, table in own.items():
        name = stored.removeprefix(PREFIX)
        wanted = table.double().clone()
        wanted[:TOKENS] = 0.5 * table[:TOKENS].double() + 0.5 * before[name].double()
        assert made[name].dtype == before[name].dtype
        assert torch.allclose(made[name].double(), wanted, rtol=exact, atol=1e-7), name
    vocabulary = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert [vocabulary[token] for token in NEW] == [TOKENS, TOKENS + 1, TOKENS + 2]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == vocabulary
    assert config_of(tmp_path / "out")["vocab_size"] == TOKENS + 3
    assert done.measured.bytes_read == done.plan.bytes_read


def test_the_vocabulary_of_a_model_with_an_adapter_can_be_the_outputs(tmp_path: Path) -> None:
    """With another model whose tokens are in other rows: rows of the adapter's table are not moved, the other's are."""
    base = write_base(tmp_path)
    adapter = write_resized(tmp_path / "a", tables(EMBEDDING, HEAD))
    other = write_model(tmp_path / "other", with_tokens(BASE_TOKENIZER, *reversed(NEW)), 2)
    reference = f"{base}+{adapter}"
    for source, files in ((reference, adapter), (str(other), other)):
        out = tmp_path / f"out-{files.name}"
        merge(linear(reference, str(other), tokenizer_source=source), out, CPU)
        made = read_model(out)
        assert (out / "tokenizer.json").read_bytes() == (files / "tokenizer.json").read_bytes()
        ours, theirs = (read_adapter(adapter), read_model(other))
        tokens = (Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab() for path in (out, adapter, other))
        rows, own, others = tokens
        for name in (EMBEDDING, HEAD):
            for text in (*NEW, "<s>", "Ġthe"):
                mean = 0.5 * ours[f"{PREFIX}{name}"][own[text]].double() + 0.5 * theirs[name][others[text]].double()
                assert torch.allclose(made[name][rows[text]].double(), mean, rtol=1e-6, atol=1e-7)


def test_embeddings_of_the_same_size_merge_without_a_tokenizer_key(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    adapters = [write_resized(tmp_path / name, tables(EMBEDDING, HEAD, seed=seed)) for seed, name in enumerate("ab")]
    done = merge(linear(*(f"{base}+{each}" for each in adapters)), tmp_path / "out", CPU)
    made, (a, b) = read_model(tmp_path / "out"), map(read_adapter, adapters)
    for name in (EMBEDDING, HEAD):
        wanted = 0.5 * a[f"{PREFIX}{name}"].double() + 0.5 * b[f"{PREFIX}{name}"].double()
        assert torch.allclose(made[name].double(), wanted, rtol=1e-6, atol=1e-7)
    assert not any("vocabular" in warning for warning in done.plan.warnings)


def test_tokens_of_the_adapters_tokenizer_without_a_row_are_reported(tmp_path: Path) -> None:
    """The embedding was resized, and not saved."""
    base = write_base(tmp_path)
    adapter = write_resized(tmp_path / "a", {})
    (warning,) = plan(passthrough(base, adapter), CPU).warnings
    beyond = f"has tokens beyond the {TOKENS} rows of the output's embeddings: '<|think|>' ({TOKENS})"
    assert f"the tokenizer of {base}+{adapter} {beyond}" in warning


def test_adapters_with_different_tokens_in_the_same_rows_are_reported(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    a = write_resized(tmp_path / "a", tables(EMBEDDING, HEAD))
    b = write_resized(tmp_path / "b", tables(EMBEDDING, HEAD), with_tokens(BASE_TOKENIZER, "<p>", "<q>", "<r>"))
    warnings = plan(linear(f"{base}+{a}", f"{base}+{b}"), CPU).warnings
    assert any(f"row {TOKENS} is '<|think|>' in {base}+{a} and '<p>' in {base}+{b}" in each for each in warnings)


def test_other_sizes_without_a_tokenizer_key_are_an_error(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    adapter = write_resized(tmp_path / "a", tables(EMBEDDING, HEAD))
    with pytest.raises(CheckpointError, match="tokenizer_source: union"):
        plan(linear(str(base), f"{base}+{adapter}"), CPU)


def test_factors_of_embeddings_cannot_be_rearranged(tmp_path: Path) -> None:
    """They can be added to a resized table, though."""
    base = write_base(tmp_path)
    rows = TOKENS + len(NEW)
    factors = {
        f"{PREFIX}model.embed_tokens.base_layer.weight": tables(EMBEDDING)[f"{PREFIX}{EMBEDDING}"],
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.randn(
            4, rows, generator=torch.Generator().manual_seed(5)
        ),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.randn(
            HIDDEN, 4, generator=torch.Generator().manual_seed(6)
        ),
    }
    adapter = write_resized(tmp_path / "a", factors | tables(HEAD))
    merge(passthrough(base, adapter), tmp_path / "out", CPU)
    table, a, b = (each.double() for each in factors.values())
    made = read_model(tmp_path / "out")[EMBEDDING].double()
    assert torch.allclose(made, table + 2 * (b @ a).T, rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="is changed by an adapter .* can't be rearranged"):
        plan(linear(f"{base}+{adapter}", str(base), tokenizer_source="base"), CPU)


def test_of_several_adapters_the_one_with_embeddings_has_the_tokenizer(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    style = write_resized(tmp_path / "style", {}, BASE_TOKENIZER)
    adapter = write_resized(tmp_path / "a", tables(EMBEDDING, HEAD))
    for both in (f"{base}+{style}+{adapter}", f"{base}+{adapter}+{style}"):
        recipe = {"merge_method": "passthrough", "models": [{"model": both}]}
        found = plan(recipe, CPU)
        assert found.files.tokenizer.path == adapter
        assert found.warnings == ()


def test_the_tokenizer_is_that_of_a_stages_output_and_of_a_stage_with_an_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    adapter = write_resized(tmp_path / "a", tables(EMBEDDING, HEAD))
    for first, last in ((f"{base}+{adapter}", "first"), (str(base), f"first+{adapter}")):
        recipe = tmp_path / "r.yml"
        stages = (f"merge_method: passthrough\nmodels: [{{model: {each}}}]\n" for each in (first, last))
        recipe.write_text("---\n".join(("name: first\n" + next(stages), *stages)))
        out = tmp_path / f"out-{last[:6]}"
        merge(recipe, out, CPU)
        assert torch.equal(read_model(out)[EMBEDDING], read_adapter(adapter)[f"{PREFIX}{EMBEDDING}"])
        assert (out / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
        assert config_of(out)["vocab_size"] == TOKENS + len(NEW)


def test_smaller_tables_are_applied(tmp_path: Path) -> None:
    """Resizing to the number of tokens removes padding."""
    base = write_model(tmp_path / "base", BASE_TOKENIZER, 1, rows=TOKENS + 20)
    adapter = write_resized(tmp_path / "a", tables(EMBEDDING, HEAD, rows=TOKENS), None)
    done = merge(passthrough(base, adapter), tmp_path / "out", CPU)
    assert config_of(tmp_path / "out")["vocab_size"] == TOKENS == len(read_model(tmp_path / "out")[HEAD])
    assert done.plan.warnings == ()


PEFT_CASES: dict[str, dict[str, Any]] = {
    "only resized": {"target_modules": ["q_proj"]},
    "saved in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "trained tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, TOKENS, TOKENS + 2]},
    },
}


def trained_by_peft(base: Path, adapter: Path, config: dict[str, Any]) -> Any:
    """Resize a model, give the parameters that PEFT trains random values, save the adapter, and return the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(TOKENS + len(NEW), mean_resizing=False)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **config))
        generator = torch.Generator().manual_seed(9)
        for parameter in filter(lambda each: each.requires_grad, adapted.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        adapted.save_pretrained(adapter, save_embedding_layers=True)
    ADAPTED.save(str(adapter / "tokenizer.json"))
    return adapted.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", PEFT_CASES)
def test_what_peft_saves_after_resizing_is_what_peft_merges(tmp_path: Path, case: str, tied: bool) -> None:
    base = write_base(tmp_path, tied=tied)
    adapted = trained_by_peft(base, tmp_path / "a", PEFT_CASES[case])
    merge(passthrough(base, tmp_path / "a"), tmp_path / "out", CPU)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[1, 5, TOKENS, TOKENS + 1, TOKENS + 2]])
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
