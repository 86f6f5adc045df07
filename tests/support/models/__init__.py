"""Models to merge: shapes, values, checkpoint files."""

from tests.support.models.encoder import encoder_dir, fine_tuned_encoder_dir, perturbed_encoder
from tests.support.models.files import header_bytes, write_checkpoint, write_tokenizer
from tests.support.models.shapes import (
    Model,
    Shape,
    deepseek_v3,
    llama,
    llama_3_1_405b,
    llama_3_2_1b,
    llama_3_2_3b,
    llama_3_8b,
    llama_3_70b,
    llama_tensors,
    qwen3_moe,
    tiny_llama,
)
from tests.support.models.values import BITS, CHUNK, POOL, Fill, FineTune, Random, Values, encode, normal

__all__ = [
    "BITS",
    "CHUNK",
    "POOL",
    "Fill",
    "FineTune",
    "Model",
    "Random",
    "Shape",
    "Values",
    "deepseek_v3",
    "encode",
    "encoder_dir",
    "fine_tuned_encoder_dir",
    "header_bytes",
    "llama",
    "llama_3_1_405b",
    "llama_3_2_1b",
    "llama_3_2_3b",
    "llama_3_8b",
    "llama_3_70b",
    "llama_tensors",
    "normal",
    "perturbed_encoder",
    "qwen3_moe",
    "tiny_llama",
    "write_checkpoint",
    "write_tokenizer",
]
