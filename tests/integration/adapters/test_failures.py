"""What other programs that apply adapters have got wrong: each once, against a float64 reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergeloom
from mergeloom.errors import CheckpointError
from tests.support import models
from tests.support.adapters.files import PREFIX, product, read_adapter, write_adapter, write_lora
from tests.support.models.shapes import Model
from tests.support.outputs import read_model

BOUND = 1e-6
Q = "model.layers.1.self_attn.q_proj"
LLAMA = models.tiny_llama(layers=2)
EXPERTS, HIDDEN, WIDE, RANK = 4, 16, 24, 2
SEPARATE = "model.layers.{}.block_sparse_moe.experts.{}.{}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.write_checkpoint(tmp_path / "base", LLAMA, fill=0)


def applied(tmp_path: Path, reference: str, **more: object) -> dict[str, Tensor]:
    """The tensors of a model with adapters, in float32 unless the recipe says otherwise."""
    recipe = {"merge_method": "passthrough", "models": [{"model": reference}], "out_dtype": "float32"} | more
    mergeloom.merge(recipe, tmp_path / "out")
    return read_model(tmp_path / "out")


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether values are as exact as float32 arithmetic makes them."""
    return bool((found.double() - expected).abs().max() <= BOUND * expected.abs().max())


def test_the_changes_of_several_adapters_are_added_and_not_their_factors(tmp_path: Path, base: Path) -> None:
    a, b = (write_lora(tmp_path / name, LLAMA.tensors, seed=seed) for seed, name in enumerate("ab", 1))
    weight = read_model(base)[f"{Q}.weight"].double()
    found = applied(tmp_path, f"{base}+{a}+{b}")[f"{Q}.weight"]
    assert close(found, weight + product(a, Q) + product(b, Q))
    both = [read_adapter(each) for each in (a, b)]
    factors = [sum(each[f"{PREFIX}{Q}.lora_{which}.weight"].double() for each in both) for which in "BA"]
    assert not close(found, weight + 2 * (factors[0] @ factors[1]))


@pytest.mark.parametrize("weight", [-0.5, -1.0, 0.25])
def test_the_sign_of_a_weight_is_kept(tmp_path: Path, base: Path, weight: float) -> None:
    a = write_lora(tmp_path / "a", LLAMA.tensors)
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": f"{base}+{a}"}]}
    mergeloom.merge(recipe | {"parameters": {"weight": weight}, "out_dtype": "float32"}, tmp_path / "out")
    expected = read_model(base)[f"{Q}.weight"].double() + weight * product(a, Q)
    assert close(read_model(tmp_path / "out")[f"{Q}.weight"], expected)


def test_a_rank_stabilized_scale_is_applied_once(tmp_path: Path, base: Path) -> None:
    a = write_lora(tmp_path / "a", LLAMA.tensors, rank=4, use_rslora=True, lora_alpha=6)
    factors = read_adapter(a)
    expected = factors[f"{PREFIX}{Q}.lora_B.weight"].double() @ factors[f"{PREFIX}{Q}.lora_A.weight"].double()
    expected = read_model(base)[f"{Q}.weight"].double() + 6 / 4**0.5 * expected
    assert close(applied(tmp_path, f"{base}+{a}")[f"{Q}.weight"], expected)


def mixtral(tmp_path: Path, *, shard_bytes: int | None = None) -> Path:
    """A model with separate experts, as Mixtral is stored."""
    llama = models.tiny_llama(layers=2, hidden=HIDDEN)
    tensors = {name: shape for name, shape in llama.tensors.items() if ".mlp." not in name}
    for layer in range(2):
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name in ("w1", "w3", "w2"):
                shape = (HIDDEN, WIDE) if name == "w2" else (WIDE, HIDDEN)
                tensors[SEPARATE.format(layer, expert, name) + ".weight"] = shape
    sizes = {"num_local_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 2}
    model = Model(tensors, {**llama.config, "model_type": "mixtral", **sizes})
    return models.write_checkpoint(tmp_path / "base", model, fill=0, shard_bytes=shard_bytes)


def fused_adapter(directory: Path, *, only: int | None = None) -> Path:
    """An adapter of the fused experts of both layers; if `only` is set, with zeros in A for all other experts."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor | None] = {}
    for layer in range(2):
        for wrapper, into, out in ((".base_layer", HIDDEN, 2 * WIDE), ("", WIDE, HIDDEN)):
            module = f"{PREFIX}model.layers.{layer}.mlp.experts{wrapper}"
            a = torch.randn(EXPERTS * RANK, into, generator=generator)
            if only is not None:
                a.view(EXPERTS, RANK, into)[[each for each in range(EXPERTS) if each != only]] = 0
            tensors[f"{module}.lora_A.weight"] = a
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, RANK * EXPERTS, generator=generator)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return write_adapter(directory, tensors, r=RANK, lora_alpha=RANK, target_parameters=targets)


def expected_experts(adapter: Path, layer: int, expert: int) -> dict[str, Tensor]:
    """What the adapter of fused experts adds to the projections of one expert."""
    found = {name: tensor.double() for name, tensor in read_adapter(adapter).items()}
    module, added = f"{PREFIX}model.layers.{layer}.mlp.experts", []
    for wrapper in (".base_layer", ""):
        a, b = (found[f"{module}{wrapper}.lora_{which}.weight"] for which in "AB")
        added.append(b.view(b.shape[0], RANK, EXPERTS)[:, :, expert] @ a.view(EXPERTS, RANK, -1)[expert])
    return {"w1": added[0][:WIDE], "w3": added[0][WIDE:], "w2": added[1]}


@pytest.mark.parametrize("shard_bytes", [None, 2_000], ids=["one file", "many shards"])
def test_each_expert_gets_its_own_slice_of_a_packed_adapter_in_every_shard(
    tmp_path: Path, shard_bytes: int | None
) -> None:
    base = mixtral(tmp_path, shard_bytes=shard_bytes)
    assert len(list(base.glob("*.safetensors"))) > 8 or shard_bytes is None
    adapter = fused_adapter(tmp_path / "adapter")
    found, own = applied(tmp_path, f"{base}+{adapter}"), read_model(base)
    for layer in range(2):
        for expert in range(EXPERTS):
            for name, added in expected_experts(adapter, layer, expert).items():
                full = SEPARATE.format(layer, expert, name) + ".weight"
                assert close(found[full], own[full].double() + added), full


def test_an_expert_s_change_reaches_no_other_expert(tmp_path: Path) -> None:
    base, adapter = mixtral(tmp_path), fused_adapter(tmp_path / "adapter", only=2)
    found, own = applied(tmp_path, f"{base}+{adapter}"), read_model(base)
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, own[name].float())}
    assert changed == {SEPARATE.format(layer, 2, name) + ".weight" for layer in range(2) for name in ("w1", "w2", "w3")}


def test_changes_of_experts_are_never_dropped(tmp_path: Path) -> None:
    """An adapter of single experts is applied to every one, and one that fits no expert is an error."""
    base, own = mixtral(tmp_path), None
    shapes = {name: tuple(tensor.shape) for name, tensor in read_model(base).items()}
    adapter = write_lora(tmp_path / "adapter", shapes, targets=("w1", "w2", "w3"))
    found, own = applied(tmp_path, f"{base}+{adapter}"), read_model(base)
    for layer in range(2):
        for expert in range(EXPERTS):
            for name in ("w1", "w2", "w3"):
                module = SEPARATE.format(layer, expert, name)
                assert close(found[f"{module}.weight"], own[f"{module}.weight"].double() + product(adapter, module))
    misnamed = {name.replace("block_sparse_moe.experts", "moe.expert"): shape for name, shape in shapes.items()}
    wrong = write_lora(tmp_path / "wrong", misnamed, targets=("w1", "w2", "w3"))
    with pytest.raises(CheckpointError, match=r"changes 24 tensors that .* lacks: model\.layers\.0\.moe\.expert\.0\.w"):
        applied(tmp_path, f"{base}+{wrong}")


def test_a_trained_head_is_kept_under_tied_embeddings(tmp_path: Path) -> None:
    llama = models.tiny_llama(layers=2, tied=True)
    base = models.write_checkpoint(tmp_path / "base", llama, fill=0)
    shape = llama.tensors["model.embed_tokens.weight"]
    head, embedding = torch.randn(shape), torch.randn(shape)
    saved = {f"{PREFIX}lm_head.weight": head, f"{PREFIX}model.embed_tokens.weight": embedding}
    adapter = write_lora(tmp_path / "a", llama.tensors, more=saved, modules_to_save=["lm_head", "embed_tokens"])
    found = applied(tmp_path, f"{base}+{adapter}")
    assert torch.equal(found["lm_head.weight"], head)
    assert torch.equal(found["model.embed_tokens.weight"], embedding)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_base_that_an_adapter_was_trained_on_is_reported(tmp_path: Path, base: Path) -> None:
    trained_on = "acme/base-bnb-4bit"
    adapter = write_lora(tmp_path / "a", LLAMA.tensors, base_model_name_or_path=trained_on)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}
    (warning,) = mergeloom.plan(recipe).warnings
    assert warning.startswith(f"{adapter} was trained on {trained_on} (adapter_config.json), and is applied to {base}")
    with pytest.raises(CheckpointError, match="which strict mode treats as errors"):
        mergeloom.plan(recipe, strict=True)
    same = write_lora(tmp_path / "same", LLAMA.tensors, base_model_name_or_path="acme/Base/")
    snapshot = tmp_path / "models--acme--Base" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(base)
    for reference in (str(base), f"{base}@main", str(base / "model.safetensors"), str(snapshot)):
        assert not mergeloom.plan(recipe | {"models": [{"model": f"{reference}+{same}"}]}).warnings


def test_base_and_change_are_rounded_together_and_once(tmp_path: Path, base: Path) -> None:
    adapter = write_lora(tmp_path / "a", LLAMA.tensors)
    weight = read_model(base)[f"{Q}.weight"]
    found = applied(tmp_path, f"{base}+{adapter}", out_dtype="bfloat16")[f"{Q}.weight"]
    added = product(adapter, Q)
    assert torch.equal(found, (weight.double() + added).float().bfloat16())
    assert not torch.equal(found, weight + added.bfloat16())  # rounded twice, as other programs do
