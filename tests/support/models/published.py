"""The shapes of the models that the recipes in recipes/ name."""

from __future__ import annotations

from collections.abc import Callable

from tests.support import models


def llama_2_70b() -> models.Model:
    """Llama-2-70B: 68,976,648,192 parameters."""
    return models.llama(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocabulary=32000)


def llama_2_13b() -> models.Model:
    """Llama-2-13B: 13,015,864,320 parameters."""
    return models.llama(layers=40, hidden=5120, intermediate=13824, heads=40, kv_heads=40, vocabulary=32000)


def mistral_7b() -> models.Model:
    """Mistral-7B: 7,241,732,096 parameters."""
    return models.llama(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocabulary=32000)


def mistral_nemo() -> models.Model:
    """Mistral-Nemo: 12,247,782,400 parameters; heads of 128, where hidden / heads is 160."""
    model = models.llama(layers=40, hidden=5120, intermediate=14336, heads=32, kv_heads=8, vocabulary=131072)
    tensors = models.llama_tensors(40, 5120, 14336, 32, 8, 131072, tied=False, head_dim=128)
    return models.Model(tensors, model.config | {"head_dim": 128})


def big_llama_681b() -> models.Model:
    """BigLlama-3.1-681B: Llama-3.1-405B with 210 layers."""
    return models.llama(layers=210, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocabulary=128256)


Preset = Callable[[], models.Model]

PRESETS: dict[Preset, tuple[str, ...]] = {
    models.llama_3_1_405b: ("meta-llama/Meta-Llama-3.1-405B-Instruct",),
    big_llama_681b: ("mlabonne/BigLlama-3.1-681B-Instruct",),
    models.llama_3_70b: ("meta-llama/Meta-Llama-3-70B-Instruct",),
    models.llama_3_8b: (
        "Alelcv27/Llama3.1-8B-Base-Code",
        "Alelcv27/Llama3.1-8B-Base-Math",
        "ChaoticNeutrals/Poppy_Porpoise-1.0-L3-8B",
        "Dampfinchen/Llama-3.1-8B-Ultra-Instruct",
        "DreadPoor/Heart_Stolen-8B-Model_Stock",
        "Hastagaras/Jamet-8B-L3-MK.V-Blackroot",
        "NeverSleep/Llama-3-Lumimaid-8B-v0.1-OAS",
        "Nitral-AI/Hathor_Stable-v0.2-L3-8B",
        "NousResearch/Hermes-3-Llama-3.1-8B",
        "Sao10K/L3-8B-Stheno-v3.2",
        "VAGOsolutions/Llama-3.1-SauerkrautLM-8b-Instruct",
        "arcee-ai/Llama-3.1-SuperNova-Lite",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "openlynn/Llama-3-Soliloquy-8B-v2",
    ),
    models.llama_3_2_3b: (
        "Medragondot/llama-3.2-3b-thinking",
        "alpindale/Llama-3.2-3B",
        "belyakoff/llama-3.2-3b-instruct-fine-tuned",
        "unsloth/Llama-3.2-3B-Instruct",
    ),
    llama_2_70b: (
        "152334H/miqu-1-70b-sf",
        "Sao10K/Euryale-1.3-L2-70B",
        "Sao10K/WinterGoddess-1.4x-70B-L2",
        "Xwin-LM/Xwin-LM-70B-V0.1",
        "cognitivecomputations/dolphin-2.2-70b",
        "lizpreciatior/lzlv_70b_fp16_hf",
    ),
    llama_2_13b: (
        "TheBloke/Llama-2-13B-fp16",
        "WizardLM/WizardLM-13B-V1.2",
        "WizardLM/WizardMath-13B-V1.0",
        "garage-bAInd/Platypus2-13B",
        "psmathur/orca_mini_v3_13b",
    ),
    mistral_7b: (
        "EmbeddedLLM/Mistral-7B-Merge-14-v0.2",
        "abacusai/Slerp-CM-mist-dpo",
        "mistralai/Mistral-7B-v0.1",
        "samir-fama/SamirGPT-v1",
    ),
    mistral_nemo: (
        "Gryphe/Pantheon-RP-1.5-12b-Nemo",
        "Sao10K/MN-12B-Lyra-v4",
        "mistralai/Mistral-Nemo-Base-2407",
        "nothingiisreal/MN-12B-Starcannon-v2",
    ),
}
"""The shapes of the models that recipes name; fine-tunes have those of what they were made from."""

SHAPES: dict[str, Preset] = {model: preset for preset, names in PRESETS.items() for model in names}
