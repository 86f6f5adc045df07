"""Validates the names of saved stages, which become folders of OUT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from ...io.companions import companion_files
from ..model.vocabularies.tokenizer_files import directory_of
from ..recipe.types import Recipe, Stage
from .sources import FileSources
from .write import CARD, CONFIG

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OURS = re.compile(r"(?:diffusion_pytorch_)?model.*\.safetensors(\.index\.json)?|mergeloom\.json", re.IGNORECASE)


def check_folders(recipe: Recipe, saved: Sequence[Stage], files: FileSources) -> None:
    """Check that the name of each saved stage is a valid folder name that nothing else in OUT uses.

    Names are compared without case, because some file systems ignore it.

    Args:
        recipe: recipe of the stages, for error locations.
        saved: stages that are written in addition to the output.
        files: file sources of the output.

    Raises:
        RecipeError: a name is not valid.
    """
    directories = [directory_of(checkpoint) for checkpoint in (files.others, files.generation, files.tokenizer)]
    companions = [
        PurePosixPath(file.path).parts[0]
        for directory in directories
        if directory.is_dir()
        for file in companion_files(directory)
    ]
    taken = {name.casefold() for name in (CARD, CONFIG, *companions)}
    for stage in saved:
        name = stage.name or ""
        if not _PLAIN.fullmatch(name) or name.endswith("."):
            message = f"invalid name {name!r} of a saved stage, which becomes a folder: use letters and digits, with "
            raise recipe.error((*stage.place, "name"), f"{message}. _ - between them")
        if name.casefold() in taken or _OURS.fullmatch(name):
            message = f"the name {name!r} of a saved stage, which becomes a folder, is already used in OUT: rename it"
            raise recipe.error((*stage.place, "name"), message)
        taken.add(name.casefold())
