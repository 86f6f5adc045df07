"""Checks that the finished merge in OUT is the one that a plan would make. Reads no tensor data, downloads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError, UsageError
from ...io.checkpoint.checkpoint import Checkpoint
from ...io.companions import FileKind, file_kind
from ...io.output.digests import bytes_digest, file_digest
from ...io.output.lock import DirectoryStatus
from ...io.units import plural
from ..files.write import DESCRIPTIONS, local_companions, model_files
from ..model.open import is_remote
from ..recipe.overrides import changed_lines
from .manifest import differences, facts_of, model_names, other_version
from .verify import Verdict, Verification

if TYPE_CHECKING:
    from ...io.hub.repository import HubFile
    from .plan import Plan

_ADVICE = "choose another OUT, or remove it"


def check_finished(plan: Plan, status: DirectoryStatus) -> str:
    """Compare a finished OUT with its manifest, and the manifest with a plan.

    The comparison covers the recipe and everything else that determines the tensors' bytes, the size and header of
    every shard, and every other file: its digest, and the content that the plan would write now. The model card and
    the published recipe are compared with their digests only, since they have comments, versions and names of paths.

    Args:
        plan: plan of the requested merge.
        status: status of a directory with a finished merge.

    Returns:
        A text for the user: what was checked, and what was not.

    Raises:
        UsageError: OUT holds another merge.
        CheckpointError: OUT is damaged, was edited, or loaders would use a file that was added to it.
        MergeloomError: a source file can't be read.
    """
    out = status.path
    try:
        check = Verification(out)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_ADVICE}") from error
    manifest = check.manifest
    facts = facts_of(plan)
    if versions := other_version(manifest, facts, ("arithmetic", "layout")):
        raise UsageError(f"{status} made by {versions}; {_ADVICE}")
    # Different releases and devices make the same bytes if everything else is equal.
    facts |= {key: manifest.get(key) for key in ("mergeloom", "device")}
    # The manifest has the published recipe, or with --keep-paths the original; only messages quote the text.
    forms = (plan.content.published, plan.recipe.text)
    facts["recipe"] = min(forms, key=lambda text: len(changed_lines(str(manifest.get("recipe", "")), text)))
    _refuse_other_merge(status, differences(manifest, facts, model_names(plan)))
    _refuse_damaged(out, check.run_without_tensors())
    _refuse_other_merge(status, list(_file_differences(plan, out, manifest["files"])))
    without = sum(not isinstance(digest, str) for digest in manifest["tensors"].values())
    return (
        "recipe, inputs (by size, header and samples), size and header of "
        f"{plural(len(manifest['shards']), 'shard')} and "
        f"{plural(len(manifest['files']), 'other file')} match; tensor data was not read: `mergeloom verify {out}` "
        "checks it" + (f", except {plural(without, 'tensor')} without a digest" if without else "")
    )


def _refuse_other_merge(status: DirectoryStatus, changes: list[str]) -> None:
    if changes:
        raise UsageError(f"{status}, and this one differs from it: {'; '.join(changes)}; {_ADVICE}")


def _refuse_damaged(out: Path, verdict: Verdict) -> None:
    if verdict.damaged:
        more = f" (and {len(verdict.damaged) - 1} more)" if len(verdict.damaged) > 1 else ""
        raise CheckpointError(
            f"{out} holds this merge, finished and then damaged or edited: {verdict.damaged[0]}{more}; restore that "
            f"file, or {_ADVICE} and run the same command again; `mergeloom verify {out}` lists all damage"
        )
    if verdict.added:
        raise CheckpointError(f"{out} holds this merge, finished; {describe_added(verdict.added)}")


def describe_added(added: tuple[str, ...], made_by: str = "merge") -> str:
    """Return the error text for files that loaders would use and a merge or an extraction (`made_by`) did not write."""
    names = ", ".join(added[:3]) + (f" and {len(added) - 3} more" if len(added) > 3 else "")
    text = f"loaders would use files that the {made_by} did not write: {names}; move them out"
    if made_by != "merge":
        return text
    return (
        f"{text}, or, if the model needs them, add them to the model that the recipe takes its files from and merge "
        "into another OUT"
    )


def _file_differences(plan: Plan, out: Path, recorded: Mapping[str, str]) -> Iterator[str]:
    """Describe how the files that the plan would write next to the shards differ from those in OUT's manifest."""
    remote: dict[Path, HubFile] = {}

    def companions(checkpoint: Checkpoint, kind: FileKind) -> Iterator[tuple[str, Path]]:
        absent = [file for file in _hub_companions(checkpoint) if not file.present]
        if not absent:
            yield from local_companions(checkpoint, kind)
            return
        # Nothing is downloaded for a finished merge, so the Hub's hashes are compared. Python files and modules'
        # settings are not: files that may be absent say which of them belong to the model.
        for file in _hub_companions(checkpoint):
            if file_kind(file.name) is kind and not file.name.endswith("/config.json"):
                remote[file.path] = file
                yield file.name, file.path

    expected = set()
    for file in model_files(plan.made, plan.content, companions):
        expected.add(file.name)
        if file.name.rpartition("/")[2] in DESCRIPTIONS:
            continue
        if file.name not in recorded:
            yield f"{file.name} is not in it and would be written now"
        elif isinstance(file.content, bytes):
            if bytes_digest(file.content) != recorded[file.name]:
                yield f"{file.name} would have other content now"
        elif not _same(file.content, remote.get(file.content), out / file.name, recorded[file.name]):
            yield f"{file.name} of the model that it comes from has changed"
    if not remote:
        yield from (f"{name} is in it and would not be written now" for name in recorded if name not in expected)


def _hub_companions(checkpoint: Checkpoint) -> tuple[HubFile, ...]:
    if not is_remote(checkpoint):
        return ()
    from ...io.hub.checkpoint import companions

    return companions(checkpoint)


def _same(source: Path, remote: HubFile | None, ours: Path, digest: str) -> bool:
    """Whether a file in OUT, whose digest was checked, is a copy of its source, which may be on the Hub only."""
    try:
        if remote is None:
            return file_digest(source) == digest
        from ...io.hub.download import has_hash

        return has_hash(ours, remote)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: can't be read: {error.strerror}") from error
