"""The public functions for adapters: check and convert the arguments, and call the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .arguments import Size, checked_limit, checked_number, checked_path, checked_texts, checked_threads

if TYPE_CHECKING:
    from .engine.execute.measurements import Progress
    from .engine.run.extract.result import ExtractedAdapter


def extract_lora(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int,
    embed: bool = False,
    low_rank_only: bool = False,
    include: Iterable[str] | str = (),
    exclude: Iterable[str] | str = (),
    seed: int = 0,
    max_ram: Size | None = None,
    threads: int | None = None,
    restart: bool = False,
    notify: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> ExtractedAdapter:
    """Extract a LoRA adapter from a fine-tuned model and its base, or resume an interrupted extraction.

    PEFT loads the adapter. While matrices are decomposed, each call of numpy's BLAS uses one thread, in the complete
    process.

    Args:
        model: fine-tuned model: a directory, a .safetensors or PyTorch file, an index, or a Hub id, whose missing files
            are downloaded.
        base: model that it was fine-tuned from.
        out: directory of the adapter: new, empty, or with an unfinished extraction of the same models and options.
        rank: rank of the factors; less for matrices with a shorter side.
        embed: whether embeddings and the head get factors, too, rather than being saved in full.
        low_rank_only: whether to leave out everything without factors: changed norms and biases, and embeddings
            without `embed`.
        include: regular expressions; only tensors whose name one of them finds are extracted.
        exclude: regular expressions; tensors whose name one of them finds are left out.
        seed: seed of the randomized SVD of large matrices.
        max_ram: limit of the process's resident memory; by default a share of the machine's RAM.
        threads: maximum number of threads; by default the cores available to the process.
        restart: whether to discard an unfinished extraction in `out`.
        notify: callback for progress, called with the bytes read so far, from any thread.
        say: callback for messages, such as how much is downloaded.

    Returns:
        The adapter, with the error of each matrix.

    Raises:
        CheckpointError: a model is missing or damaged, has NaN or infinite values, is quantized in an unknown format,
            or was not fine-tuned from `base`.
        BudgetError: the extraction exceeds the budget.
        DiskSpaceError: the disk is too small for the adapter.
        EnvironmentFailure: reading, writing or downloading failed.
        UsageError: an argument is invalid, or `out` has other files.
    """
    from .engine.run.extract.extraction import Extraction
    from .engine.run.extract.options import ExtractOptions
    from .engine.run.merge import fetch

    options = ExtractOptions(
        checked_number("rank", rank),
        embed=embed,
        low_rank_only=low_rank_only,
        include=checked_texts("include", include),
        exclude=checked_texts("exclude", exclude),
        seed=checked_number("seed", seed),
    )
    extraction = Extraction(
        checked_path("model", model),
        checked_path("base", base),
        checked_path("out", out),
        options,
        max_ram=checked_limit("max_ram", max_ram),
        threads=checked_threads(threads),
    )
    tell = say or (lambda text: None)
    fetch(() if extraction.complete else extraction.downloads, tell)
    return extraction.run(notify, tell, restart=restart)
