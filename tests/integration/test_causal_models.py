"""transformers loads merges of twelve causal language model classes of different kinds, with correct values.

`make soak` does the same for every class.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.support.causal.checks import Outcome, Pair, check_linear, check_stack
from tests.support.causal.models import causal_models

OK = Outcome("ok")

STACKS = {
    "qwen3": "",
    "gpt-sw3": "",  # GPT-2: transposed weights, absolute positions, a tied head
    "phi3": "",  # fused queries, keys and values
    "mixtral": "",
    "deepseek_v3": "first_k_dense_replace = 3",  # a dense layer after layers with experts
    "gpt_oss": "",  # fused experts, windows in every other layer
    "gemma3_text": "",
    "gemma4_text": "hidden_size_per_layer_input",
    "qwen3_next": "",  # linear attention
    "mamba2": "",
    "zamba2": "_adapter_list",  # blocks that layers share, each with an adapter per layer
    "bart": "",  # the decoder of an encoder-decoder model
}
"""The classes by ``model_type``, and what the warning about their stack names; empty for no warning."""


@pytest.mark.parametrize("model_type", STACKS)
def test_merges_load_with_correct_values(model_type: str, tmp_path: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    pair = Pair(next(kind for kind in causal_models() if kind.model_type == model_type), tmp_path)
    assert check_linear(pair) == OK
    stack = check_stack(pair)
    if STACKS[model_type]:
        assert stack.result == "warned"
        assert STACKS[model_type] in stack.text
    else:
        assert stack == OK
