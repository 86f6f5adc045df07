"""Resuming after something was changed: a shard, the journal, an input, the config. Right bytes, or a refusal."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.graph.graph import Kind
from mergeloom.engine.run.manifest import MANIFEST
from mergeloom.engine.run.merge import Result, merge
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, MergeloomError
from mergeloom.io import platform
from mergeloom.io.output.journal import Journal, JournalContent, read_journal
from mergeloom.io.output.lock import WORK
from tests.support.faults import Kill, Stopped, watching
from tests.support.merges.small import make_blocks_small
from tests.support.models import FineTune, Random, write_checkpoint
from tests.support.outputs import digests

OPTIONS = Options(max_ram=4 << 30, device="cpu", threads=1, shard_size=300_000)
GROUP = BLOCK = 16 << 10
SHAPES = {
    "model.embed_tokens.weight": (600, 64),  # several chunks
    **{f"model.layers.{layer}.w.weight": (96, 64) for layer in range(4)},
    "model.norm.weight": (64,),
}
TRIALS = 10


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, chunks, and the samples of a file's identity, small enough for small tensors."""
    make_blocks_small(monkeypatch)
    monkeypatch.setattr("mergeloom.engine.schedule.schedule.SLOT_BYTES", 8 << 10)
    monkeypatch.setattr("mergeloom.io.checkpoint.identity.SAMPLE_BYTES", 16)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two fine-tunes."""
    found = [
        write_checkpoint(tmp_path / name, SHAPES, dtype="F32", fill=FineTune(Random(0), seed), config={"a": 1})
        for seed, name in enumerate(("base", "a", "b"))
    ]
    (found[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    return found


def recipe(models: list[Path], method: str = "ties") -> dict[str, Any]:
    """A merge of the models: by a method with a base, by linear, by slices that are copied in part, or of one model."""
    named = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models[1:]]
    if method == "linear":
        return {"merge_method": method, "models": named}
    if method == "passthrough":
        return {"merge_method": method, "models": [{"model": str(models[1])}]}
    if method == "slices":
        layers = [[0, 3], [1, 4]]
        sources = [[{"model": str(model), "layer_range": layers[0]} for model in models[1:]]]
        sources.append([{"model": str(models[1]), "layer_range": layers[1]}])
        slices = [{"sources": each} for each in sources]
        return {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}}
    return {"merge_method": method, "base_model": str(models[0]), "models": named, "parameters": {"density": 0.5}}


def run(what: Any, out: Path, **more: Any) -> Result:
    """Merge."""
    return merge(what, out, OPTIONS, group_bytes=GROUP, **more)


def begin(what: Any, out: Path, enough: Callable[[JournalContent], bool] | int = 4) -> None:
    """Merge until the journal says enough, or has so many records of blocks and copies."""

    def said(found: JournalContent) -> bool:
        if isinstance(enough, int):
            return sum("node" in record or "copied" in record for record in found.records) >= enough
        return enough(found)

    for after in range(8, 2000, 2):
        shutil.rmtree(out, ignore_errors=True)
        with pytest.raises(Stopped), watching(Kill(after)):
            run(what, out)
        found = read_journal(out / WORK / "journal")
        if found is not None and said(found):
            return
    pytest.fail("no kill left enough in the journal")


def flip(file: Path, offset: int) -> None:
    """Flip a bit, and restore the mtime."""
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 4]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def started(found: JournalContent | None) -> dict[int, int]:
    """The nodes of which the journal says that something is durable, and how many blocks."""
    assert found is not None
    blocks: dict[int, int] = {}
    for record in found.records:
        if "node" in record:
            blocks[record["node"]] = record["first"] + len(record["blocks"])
    return blocks


def source(planned: Plan, node: int, model: Path) -> tuple[Path, int, int]:
    """Where a node's tensor of a model lies: file, offset, bytes."""
    graph = planned.built.graph
    refs = [graph.reads[read] for read in graph.node_sources[node]]
    ref = next(ref for ref in refs if ref.file.parent == model)
    return ref.file, ref.offset, ref.nbytes


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("where", ["first byte", "last byte"])
def test_an_input_of_which_used_bytes_have_changed_is_refused(
    method: str, where: str, models: list[Path], tmp_path: Path
) -> None:
    """Outside the samples, with the old mtime: two versions would be mixed, and the manifest would fit them."""
    what, out = recipe(models, method), tmp_path / "out"
    run(what, tmp_path / "whole")
    planned = plan(what, OPTIONS)

    def chosen(found: JournalContent | None) -> int | None:
        """A durable node; for a method with reductions, an incomplete one, whose sources were read completely."""
        for node, blocks in started(found).items():
            whole = blocks * BLOCK >= planned.built.graph.nbytes(node)
            if whole if method == "linear" else blocks and not whole:
                return node
        return None

    begin(what, out, lambda found: chosen(found) is not None)
    node = chosen(read_journal(out / WORK / "journal"))
    assert node is not None
    file, offset, nbytes = source(planned, node, models[2])
    offset += 40 if where == "first byte" else nbytes - 40
    flip(file, offset)
    before = digests(out)
    name = planned.built.graph.outputs[planned.built.graph.destinations()[node][0]].name
    with pytest.raises(CheckpointError, match=rf"{file} was changed since the merge began: tensor {name}") as refused:
        run(what, out)
    assert refused.value.exit_code == 4
    assert digests(out).keys() == before.keys()
    assert digests(out)[f"{WORK}/journal"] == before[f"{WORK}/journal"]
    flip(file, offset)  # it is put back: its ctime has changed all the same
    said: list[str] = []
    run(what, out, say=said.append)
    assert "written to or replaced since the merge began: model.safetensors; the " in said[0]
    assert digests(out) == digests(tmp_path / "whole")


def test_an_input_of_which_only_unused_bytes_have_changed_is_used_as_it_is_now(
    models: list[Path], tmp_path: Path
) -> None:
    what, out = recipe(models, "linear"), tmp_path / "out"
    planned = plan(what, OPTIONS)
    begin(what, out)
    unused = [node for node in planned.built.graph if node not in started(read_journal(out / WORK / "journal"))]
    places = [source(planned, node, models[2]) for node in unused]
    file, offset, _ = next(place for place in places if place[2] > BLOCK)
    flip(file, offset + 40)
    run(what, out)
    run(what, tmp_path / "whole")  # with the input as it is now
    assert digests(out) == digests(tmp_path / "whole")


def test_the_digests_of_used_bytes_survive_several_runs(models: list[Path], tmp_path: Path) -> None:
    what, out = recipe(models, "linear"), tmp_path / "out"
    planned = plan(what, OPTIONS)
    begin(what, out, 2)
    node = min(started(read_journal(out / WORK / "journal")))
    after = 30
    for _ in range(2):
        before = sum(started(read_journal(out / WORK / "journal")).values())
        while sum(started(read_journal(out / WORK / "journal")).values()) <= before:  # threads decide what is durable
            with pytest.raises(Stopped), watching(Kill(after)):
                run(what, out)
            after += 1
    file, offset, _ = source(planned, node, models[1])
    flip(file, offset + 40)
    with pytest.raises(CheckpointError, match=f"{file} was changed since the merge began"):
        run(what, out)


def test_a_copy_of_an_input_is_as_good_as_the_input(models: list[Path], tmp_path: Path) -> None:
    """Another inode, mtime and ctime, and the same bytes."""
    what, out = recipe(models), tmp_path / "out"
    run(what, tmp_path / "whole")
    begin(what, out)
    for model in models:
        file = model / "model.safetensors"
        shutil.copy(file, tmp_path / "copy")
        (tmp_path / "copy").replace(file)
    run(what, out)
    assert digests(out) == digests(tmp_path / "whole")


def test_an_input_without_digests_is_not_trusted(models: list[Path], tmp_path: Path) -> None:
    what, out = recipe(models), tmp_path / "out"
    begin(what, out)
    found = read_journal(out / WORK / "journal")
    assert found is not None
    assert any("source" in record for record in found.records)
    records = [record for record in found.records if "source" not in record]
    Journal(out / WORK / "journal", found.facts, records).close()
    os.utime(models[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors was changed .*: the journal has no digest of tensor"):
        run(what, out)


# ------------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("what", ["shard", "source"])
def test_a_copy_by_the_kernel_is_compared_with_its_source(
    what: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "DISABLED", {"clone"})
    merged, out = recipe(models, "passthrough"), tmp_path / "out"
    run(merged, tmp_path / "before")
    planned = plan(merged, OPTIONS)
    begin(merged, out, 2)
    found = read_journal(out / WORK / "journal")
    assert found is not None
    shard, start, end = next(record["copied"] for record in found.records if "copied" in record)
    if what == "shard":
        flip(out / WORK / "out" / planned.layout.shards[shard].name, (start + end) // 2)
    else:
        output = next(each for each in planned.layout.shards[shard].outputs if planned.layout.offset_of[each] >= start)
        file, offset, _ = source(planned, planned.built.graph.outputs[output].node, models[1])
        flip(file, offset + 40)
    said: list[str] = []
    result = run(merged, out, say=said.append)
    assert any("of copied tensors differ from their sources" in text for text in said), said
    run(merged, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")
    assert (digests(out) == digests(tmp_path / "before")) == (what == "shard")
    assert result.measured.bytes_checked >= 2 * (end - start)
    for key in ("bytes_read", "bytes_written", "bytes_shared"):
        told = result.to_dict()
        assert told["measured"][key] + told["measured"]["earlier"][key] == told[key], key


def test_an_untouched_copy_is_kept(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "DISABLED", {"clone"})
    what, out = recipe(models, "passthrough"), tmp_path / "out"
    begin(what, out, 3)
    result = run(what, out)
    assert result.earlier.bytes_written > 0
    assert result.measured.bytes_written + result.earlier.bytes_written == result.plan.bytes_written


@pytest.mark.parametrize("what", ["shard", "source"])
def test_what_was_cloned_is_cloned_again(
    what: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that clones is imitated: a changed byte of a clone is not shared any more."""
    cloned = imitate_clones(monkeypatch)
    merged, out = recipe(models, "passthrough"), tmp_path / "out"
    planned = plan(merged, OPTIONS)
    begin(merged, out, 1)  # clones are committed together, since they take no space
    found = read_journal(out / WORK / "journal")
    assert found is not None
    shard, start, end = next(record["copied"] for record in found.records if "copied" in record)
    output = next(each for each in planned.layout.shards[shard].outputs if planned.layout.offset_of[each] >= start)
    if what == "shard":
        flip(out / WORK / "out" / planned.layout.shards[shard].name, (start + end) // 2)
    else:
        file, offset, _ = source(planned, planned.built.graph.outputs[output].node, models[1])
        flip(file, offset + 5000)
    cloned.clear()
    said: list[str] = []
    result = run(merged, out, say=said.append)
    assert sum(cloned) == result.measured.bytes_shared == result.plan.bytes_shared > 0
    assert not any("differ from" in text for text in said)
    run(merged, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def imitate_clones(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let ranges be cloned on any file system; the sizes of those that are."""
    sizes: list[int] = []

    def clone(source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
        os.pwrite(target, os.pread(source, nbytes, source_offset), target_offset)
        sizes.append(nbytes)
        return 0

    monkeypatch.setattr("mergeloom.io.output.clone.clone_range", clone)
    monkeypatch.setattr("mergeloom.engine.run.placement.why_no_clone", lambda source, scratch: 0)
    monkeypatch.setattr("mergeloom.engine.graph.layout.SHORTEST_RUN", 4096)
    return sizes


# ------------------------------------------------------------------------------------------------ anything


def kill_at_random(what: Any, out: Path, chance: random.Random, calls: int) -> None:
    """Kill a merge before one of its calls that change files, while it is unfinished."""
    while True:
        try:
            with watching(Kill(chance.randrange(10, calls), torn=True)):
                run(what, out)
        except Stopped:
            if not (out / MANIFEST).exists():
                return
        shutil.rmtree(out)  # how many calls there are depends on the threads


def tampered(chance: random.Random, models: list[Path], out: Path) -> str:
    """Change something at random; what."""
    stage = out / WORK / "out"
    shards = sorted(stage.rglob("*.safetensors")) if stage.exists() else []
    kinds: dict[str, Callable[[], Path | None]] = {
        "shard": lambda: chance.choice(shards) if shards else None,
        "journal": lambda: out / WORK / "journal" if (out / WORK / "journal").exists() else None,
        "input": lambda: chance.choice(models) / "model.safetensors",
        "config": lambda: chance.choice(models) / "config.json",
    }
    kind = chance.choice(sorted(kinds))
    file = kinds[kind]()
    if file is None:
        return "nothing"
    if kind == "config":
        file.write_text(json.dumps({"a": chance.randrange(1 << 30)}))
    else:
        flip(file, chance.randrange(file.stat().st_size))
    return f"{kind} {file}"


@pytest.mark.parametrize("method", ["slices", "ties"])
def test_killed_at_random_and_tampered_with(
    method: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the merges are tampered with before they are resumed. What then comes out is what a new merge makes."""
    monkeypatch.setattr(platform, "DISABLED", {"clone"})
    what = recipe(models, method)
    everything = Kill()
    with watching(everything):
        run(what, tmp_path / "whole")
    chance = random.Random(method)
    refused = finished = 0
    pristine = tmp_path / "pristine"
    for model in models:
        shutil.copytree(model, pristine / model.name)
    for trial in range(TRIALS):
        out, fresh = tmp_path / f"out{trial}", tmp_path / f"fresh{trial}"
        kill_at_random(what, out, chance, len(everything.calls))
        change = tampered(chance, models, out) if trial % 2 else "nothing"
        try:
            run(what, out)
        except MergeloomError as error:
            assert change != "nothing"
            assert error.exit_code in (2, 4, 5), (trial, change, error)
            refused += 1
        else:
            finished += 1
            run(what, fresh)
            assert digests(out) == digests(fresh), (trial, change)
        for model in models:
            shutil.rmtree(model)
            shutil.copytree(pristine / model.name, model)
    assert finished >= TRIALS // 2


def test_what_was_tampered_with_is_of_all_kinds(models: list[Path], tmp_path: Path) -> None:
    what, out = recipe(models), tmp_path / "out"
    begin(what, out)
    chance = random.Random(0)
    kinds = {tampered(chance, models, out).split()[0] for _ in range(40)}
    assert kinds == {"shard", "journal", "input", "config"}


def test_lanes_and_kernel_copies_are_both_among_the_trials(models: list[Path]) -> None:
    graph = plan(recipe(models, "slices"), replace(OPTIONS)).built.graph
    assert {operation.kind for operation in graph.operations} == {Kind.COPY, Kind.MERGE}
