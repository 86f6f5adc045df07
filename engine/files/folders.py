"""The folders of OUT that saved stages go to: which names they may have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from ...io.companions import companion_files
from ..recipe.types import Recipe, Stage
from .sources import FileSources, directory_of
from .write import CARD, CONFIG

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OURS = re.compile(r"model.*\.safetensors(\.index\.json)?|mergeloom\.json", re.IGNORECASE)


def check_folders(recipe: Recipe, saved: Sequence[Stage], files: FileSources) -> None:
    """Refuse names of saved stages that can be no folder's, or that something else in OUT has.

    Names that differ only in case count as the same, as some file systems have it.

    Args:
        recipe: for where its mistakes stand.
        saved: the stages that are written beside the output.
        files: of the output.

    Raises:
        RecipeError: with the place of the name.
    """
    beside = [directory for found in (files.others, files.tokenizer) if (directory := directory_of(found)).is_dir()]
    companions = [PurePosixPath(file.path).parts[0] for directory in beside for file in companion_files(directory)]
    taken = {name.casefold() for name in (CARD, CONFIG, *companions)}
    for stage in saved:
        name = stage.name or ""
        if not _PLAIN.fullmatch(name) or name.endswith("."):
            message = f"a stage that is saved gets a folder of its name, which {name!r} can't be: use letters, digits, "
            raise recipe.error((*stage.place, "name"), f"{message}and . _ - between them")
        if name.casefold() in taken or _OURS.fullmatch(name):
            message = f"a stage that is saved gets a folder of its name, and {name!r} is already the name of something "
            raise recipe.error((*stage.place, "name"), f"{message}else in OUT")
        taken.add(name.casefold())
