"""Facts about architectures that config.json leaves to their code, by ``model_type``.

Source: the configuration and modeling files of transformers 5.23,
https://github.com/huggingface/transformers/tree/main/src/transformers/models. A test compares the tables with the
installed version.
"""

from __future__ import annotations

TIED_BY_DEFAULT = frozenset(
    """albert aya_vision bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip
    bloom camembert cohere cohere2 cohere2_moe cohere2_vision convbert cpmant ctrl data2vec-text deberta deberta-v2
    diffusion_gemma distilbert electra ernie ernie4_5 ernie4_5_moe ernie4_5_vl_moe esm falcon falcon_mamba flaubert
    florence2 fnet funnel gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text got_ocr2 gpt2
    gpt_bigcode gpt_neo gpt_neox_japanese granite_speech hunyuan_vl ibert internvl janus jetmoe kosmos-2 kosmos-2.5
    layoutlm led lfm2 lfm2_moe lfm2_vl longformer longt5 luke lxmert m2m_100 mamba marian mbart megatron-bert minicpm3
    mistral3 mobilebert modernbert modernbert-decoder moonshine mpnet mpt mra mt5 mvp nllb-moe nomic_bert nystromformer
    openai-gpt opt ovis2 paligemma pegasus pegasus_x plbart prophetnet qwen3_asr recurrent_gemma roberta
    roberta-prelayernorm roc_bert roformer seamless_m4t seamless_m4t_v2 smollm3 speech_to_text speecht5 squeezebert
    starcoder2 switch_transformers t5 t5gemma t5gemma2 tapas trocr udop vaultgemma visual_bert whisper xglm xlm
    xlm-roberta xlm-roberta-xl xlnet xmod yoso youtu zamba zamba2""".split()  # noqa: SIM905
)
"""Types whose head is tied to the embedding if config.json has no ``tie_word_embeddings``."""

ATTENTION_BIAS = frozenset(
    """afmoe apertus arcee bitnet chameleon cohere cohere2 cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 diffllama
    doge dots1 eurobert falcon_h1 flex_olmo gemma gemma2 gemma3_text gemma3n_text glm glm4 glm4_moe glm4_moe_lite
    glm_moe_dsa gpt_neox gpt_oss granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe llama llama4_text longcat_flash minicpm3 modernbert modernbert-decoder nemotron nemotron_h olmo olmo2
    olmo3 olmoe phimoe qwen3 qwen3_moe qwen3_next recurrent_gemma seed_oss smollm3 vaultgemma""".split()  # noqa: SIM905
)
"""Types whose attention has biases if ``attention_bias`` is true."""

MLP_BIAS = frozenset(
    """arcee bamba chameleon cwm doge eurobert falcon_h1 granite helium llama minicpm3 modernbert modernbert-decoder
    nemotron nemotron_h seed_oss smollm3""".split()  # noqa: SIM905
)
"""Types whose MLP has biases if ``mlp_bias`` is true."""

TRANSPOSED_EXPERTS = frozenset({"aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"})
"""Types that store fused experts as (experts, in, out); all others store (experts, out, in)."""

TRANSPOSED_WEIGHTS = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Types that store the matrices of linear layers as (in, out), as OpenAI's GPT does; all others store (out, in)."""
