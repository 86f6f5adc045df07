"""Merges of PyTorch checkpoints equal those of their twins in safetensors, byte for byte."""

from __future__ import annotations

import shutil
import textwrap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import mergeloom
from mergeloom.engine.run.placement import with_reflinks
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from tests.support.models import encoder_dir, perturbed_encoder
from tests.support.models.torch_files import same, tensors, write_torch_model, write_twin
from tests.support.outputs import read_model

FORMS: dict[str, dict[str, Any]] = {
    "one file": {},
    "shards": {"shards": 3},
    "shards without an index": {"shards": 2, "index": False},
    "protocol 3": {"pickle_protocol": 3},
    "protocol 4": {"pickle_protocol": 4},
    "protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy shards of protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4, "shards": 2},
}


def recipe(method: str, *models: Path) -> dict[str, Any]:
    """A recipe over models, the first of which is the base where the method has one."""
    made: dict[str, Any] = {"merge_method": method, "models": [{"model": str(model)} for model in models]}
    if method == "linear":
        made["parameters"] = {"weight": 0.5}
    if method == "ties":
        made |= {"base_model": str(models[0]), "parameters": {"weight": 0.5, "density": 0.5}}
    return made


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("twins")
    return [write_twin(root / f"twin{seed}", tensors(seed)) for seed in (1, 2, 3)]


@pytest.mark.parametrize("form", FORMS)
def test_a_merge_equals_that_of_the_twins(form: str, twins: list[Path], tmp_path: Path) -> None:
    models = [write_torch_model(tmp_path / f"torch{seed}", tensors(seed), **FORMS[form]) for seed in (1, 2)]
    for model in models:
        (model / "training_args.bin").write_bytes(b"never opened")
        (model / "optimizer.pt").write_bytes(b"never opened")
    for name, chosen in (("torch", models), ("twin", twins[:2])):
        mergeloom.merge(recipe("linear", *chosen), tmp_path / name)
    assert same(read_model(tmp_path / "torch"), read_model(tmp_path / "twin"))


@pytest.mark.parametrize("method", ["ties", "passthrough"])
def test_methods_and_mixed_inputs(method: str, twins: list[Path], tmp_path: Path) -> None:
    models = [write_torch_model(tmp_path / f"torch{seed}", tensors(seed)) for seed in (1, 2, 3)]
    count = 1 if method == "passthrough" else 3
    mixed = [models[0], twins[1], models[2]]
    for name, chosen in (("torch", models), ("twin", twins), ("mixed", mixed)):
        mergeloom.merge(recipe(method, *chosen[:count]), tmp_path / name)
    expected = read_model(tmp_path / "twin")
    assert same(read_model(tmp_path / "torch"), expected)
    assert same(read_model(tmp_path / "mixed"), expected)


def test_the_files_are_equal_if_the_tensors_have_one_order(tmp_path: Path) -> None:
    """The output has the order of its inputs, which safetensors sorts and torch doesn't."""
    states = [OrderedDict(sorted(tensors(seed).items())) for seed in (1, 2)]
    for state in states:
        state["lm_head.weight"] = state["lm_head.weight"].clone()  # else it is next to the embedding
        for name in state:
            if "_proj.weight" in name and "self_attn" in name:
                state[name] = state[name].clone()
    models = [write_torch_model(tmp_path / f"torch{n}", state) for n, state in enumerate(states)]
    plain = [write_twin(tmp_path / f"twin{n}", state) for n, state in enumerate(states)]
    for name, chosen in (("torch", models), ("twin", plain)):
        mergeloom.merge(recipe("linear", *chosen), tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("torch", "twin"))
    assert first == second


def test_the_real_encoder_saved_by_torch(tmp_path: Path) -> None:
    others = [encoder_dir(), perturbed_encoder(tmp_path / "perturbed", 5)]
    saved = []
    for number, source in enumerate(others):
        target = tmp_path / f"torch{number}"
        shutil.copytree(source, target)
        (target / "model.safetensors").unlink()
        (target / "mergeloom.json").unlink(missing_ok=True)
        torch.save(read_model(source), target / "pytorch_model.bin")
        saved.append(target)
    for name, chosen in (("torch", saved), ("twin", others)):
        mergeloom.merge(recipe("linear", *chosen), tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("torch", "twin"))
    assert first == second
    assert len(first) > 90_000_000


@pytest.mark.parametrize("method", ["linear", "ties", "passthrough"])
@pytest.mark.parametrize("form", ["one file", "legacy"])
def test_planned_bytes_are_read(method: str, form: str, tmp_path: Path) -> None:
    models = [write_torch_model(tmp_path / f"torch{seed}", tensors(seed), **FORMS[form]) for seed in (1, 2, 3)]
    chosen = recipe(method, *models[: 1 if method == "passthrough" else 3])
    planned = plan(chosen, Options(max_ram=8 << 30, device="cpu"))
    result = mergeloom.merge(chosen, tmp_path / "out", max_ram=8 << 30)
    assert result.measured.bytes_read + result.measured.bytes_shared == planned.schedule.bytes_read
    assert planned.schedule.bytes_read > 5_000
    assert not planned.built.unused


def test_copies_are_verified_with_their_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_torch_model(tmp_path / "torch", tensors(1), shards=2)
    mergeloom.merge(recipe("passthrough", model), tmp_path / "out")
    verdict = mergeloom.verify(tmp_path / "out", sources=True)
    problems = verdict.damaged, verdict.unverified, verdict.changed_sources, verdict.missing_sources
    assert problems == ((), (), (), ())
    assert verdict.tensors == len(tensors(1))
    assert mergeloom.merge(recipe("passthrough", model), tmp_path / "out").measured.bytes_written == 0
    file = model / "pytorch_model-00001-of-00002.bin"
    data = bytearray(file.read_bytes())
    checkpoint = open_checkpoint(model)
    ref = checkpoint.tensors["model.embed_tokens.weight"]
    data[ref.offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(mergeloom.MergeloomError, match=r"pytorch_model-00001-of-00002\.bin"):
        mergeloom.merge(recipe("passthrough", model), tmp_path / "out")


UNREADABLE = {
    "expanded": (torch.zeros(1, dtype=torch.bfloat16).expand(16), r"\[0\], and mergeloom can't read tensors"),
    "integers": (torch.zeros(4, 6, dtype=torch.int64).t(), r"\[1, 6\], and mergeloom can't read I64 tensors"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_view_that_cannot_be_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    tensor, reason = UNREADABLE[case]
    model = write_torch_model(tmp_path / "torch", tensors(1) | {"model.norm.weight": tensor})
    for use in (lambda: mergeloom.plan(recipe("passthrough", model)), lambda: mergeloom.inspect(model)):
        with pytest.raises(CheckpointError, match=rf"'model\.norm\.weight' .*strides {reason}.*\.contiguous\(\)"):
            use()


def test_an_adapter_is_refused_as_one(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    names = [f"base_model.model.model.layers.0.q_proj.lora_{each}.weight" for each in "AB"]
    torch.save({name: torch.ones(4, 4) for name in names}, directory / "adapter_model.bin")
    for path, reason in ((directory, "is an adapter"), (directory / "adapter_model.bin", r"is an adapter \(LoRA\)")):
        with pytest.raises(CheckpointError, match=reason):
            mergeloom.plan(recipe("passthrough", path))


@pytest.mark.parametrize("shards", [1, 2])
def test_the_script_that_renames_tensors_writes_safetensors(shards: int, tmp_path: Path) -> None:
    state = tensors(1)
    wrapped = {name.replace(".", "._orig_mod.", 1): each for name, each in state.items()}  # not a prefix
    model = write_torch_model(tmp_path / "torch", wrapped, shards=shards)
    with pytest.raises(CheckpointError) as caught:
        mergeloom.merge(recipe("passthrough", model), tmp_path / "out")
    script = textwrap.dedent(str(caught.value).partition(":\n\n")[2])
    exec(script, {})
    mergeloom.merge(recipe("passthrough", Path(f"{model}-renamed")), tmp_path / "out")
    assert same(read_model(tmp_path / "out"), state)


def test_inspect_names_the_format_and_what_is_not_used(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    wrapped = {"state_dict": tensors(1), "epoch": 3, "optimizer_states": [{"state": {0: torch.zeros(3)}}]}
    torch.save(wrapped, model / "last.ckpt")
    found = mergeloom.inspect(model / "last.ckpt").to_dict(tensors=True)
    assert found["format"] == "PyTorch (zip)"
    assert found["layers"] == 2
    assert any("not used" in remark and "'epoch', 'optimizer_states'" in remark for remark in found["remarks"])
    twin = mergeloom.inspect(write_twin(tmp_path / "twin", tensors(1))).to_dict(tensors=True)
    shapes = [{each["name"]: each["shape"] for each in each["tensor_list"]} for each in (found, twin)]
    assert shapes[0] == shapes[1]


def test_a_tensor_in_another_order_is_not_compared(tmp_path: Path) -> None:
    model, twin = write_torch_model(tmp_path / "torch", tensors(1)), write_twin(tmp_path / "twin", tensors(1))
    result = mergeloom.diff(model, twin)
    reasons = {each.name: each.reason for each in result.not_compared}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "not contiguous in A"
    assert "model.embed_tokens.weight" not in reasons


@pytest.mark.root
def test_the_kernel_copies_tensors_into_one_shard(disk: Path, out: Path) -> None:
    """Storages begin anywhere in a block, so sharing blocks would need a shard for each."""
    generator = torch.Generator().manual_seed(9)
    state = {
        f"model.layers.{layer}.{name}.weight": torch.randn(700, 401, generator=generator)
        for layer in range(4)
        for name in ("up", "down")
    }
    total = sum(tensor.nbytes for tensor in state.values())
    for number, options in enumerate(({}, {"_use_new_zipfile_serialization": False})):
        model = write_torch_model(disk / f"torch{number}", state, **options)
        (model / "config.json").unlink()
        target = out.parent / f"out{number}"
        try:
            chosen = recipe("passthrough", model)
            planned = with_reflinks(plan(chosen, Options(max_ram=8 << 30, device="cpu")), target)
            result = mergeloom.merge(chosen, target, max_ram=8 << 30)
            assert (planned.bytes_copied, planned.bytes_shared) == (total, 0)
            assert result.measured.bytes_shared == 0
            assert [file.name for file in target.glob("*.safetensors*")] == ["model.safetensors"]
            assert same(read_model(target), state)
        finally:
            shutil.rmtree(model)
