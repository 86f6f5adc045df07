"""Tables of tensor names by role. Each entry is a regular expression, with a tensor that it was added for."""

from __future__ import annotations

from typing import NamedTuple


class NamePattern(NamedTuple):
    """A regular expression for one role of tensors.

    Args:
        pattern: regular expression for a part of lowercase names; its table says which part.
        example: name of a tensor that the pattern matches.
    """

    pattern: str
    example: str


HEADS = (
    NamePattern(r"lm_head(?:\.decoder|\.out_proj)?", "lm_head.weight"),
    NamePattern(r"generator_lm_head", "generator_lm_head.weight"),  # ELECTRA
    NamePattern(r"embed_out", "embed_out.weight"),  # GPT-NeoX
    NamePattern(r"output", "output.weight"),  # InternLM2, Meta's own Llama checkpoints
    NamePattern(r"output_layer", "transformer.output_layer.weight"),  # ChatGLM
    NamePattern(r"output_projection", "output_projection.weight"),  # BioGPT
    NamePattern(r"vocab_projector", "vocab_projector.weight"),  # DistilBERT
    NamePattern(r"cls\.predictions\.decoder", "cls.predictions.decoder.weight"),  # BERT
    NamePattern(r"pred_layer\.proj", "pred_layer.proj.weight"),  # XLM
    NamePattern(r"lm_loss", "lm_loss.weight"),  # XLNet
    NamePattern(r"ff_out", "model.transformer.ff_out.weight"),  # OLMo's own checkpoints
)
"""Modules whose ``weight`` is a language model's output matrix, at any depth."""

TOP_LEVEL_HEADS = (
    NamePattern(r"decoder", "decoder.weight"),  # ModernBERT
    NamePattern(r"proj_out", "proj_out.weight"),  # Whisper
    NamePattern(r"head", "head.weight"),  # DeepSeek-V4
)
"""Modules whose ``weight`` is the output matrix at the top level only."""

EMBEDDINGS = (
    NamePattern(r"embed_tokens", "model.embed_tokens.weight"),
    NamePattern(r"wte", "transformer.wte.weight"),  # GPT-2
    NamePattern(r"word_embeddings?", "bert.embeddings.word_embeddings.weight"),
    NamePattern(r"tok_embeddings", "model.tok_embeddings.weight"),  # InternLM2
    NamePattern(r"token_embeddings?", "token_embeddings.weight"),
    NamePattern(r"tokens_embed", "tokens_embed.weight"),  # OpenAI GPT
    NamePattern(r"embed_in", "gpt_neox.embed_in.weight"),  # GPT-NeoX
    NamePattern(r"shared", "shared.weight"),  # T5, BART
    NamePattern(r"embeddings", "backbone.embeddings.weight"),  # Mamba
)
"""Modules whose ``weight`` is the matrix of token embeddings."""

BUFFERS = (
    NamePattern(r"(?:original_)?inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    NamePattern(r"cos_cached", "model.layers.0.self_attn.rotary_emb.cos_cached"),
    NamePattern(r"sin_cached", "model.layers.0.self_attn.rotary_emb.sin_cached"),
    NamePattern(r"freqs_cis", "freqs_cis"),
    NamePattern(r"masked_bias", "transformer.h.0.attn.masked_bias"),  # GPT-2
    NamePattern(r"causal_mask", "model.causal_mask"),
    NamePattern(r"attn_mask", "encoder.layers.0.blocks.1.attn_mask"),  # Swin
    NamePattern(r"tril", "blocks.0.attn.tril"),
    NamePattern(r"position_ids", "embeddings.position_ids"),  # BERT, CLIP
    NamePattern(r"version", "version"),  # fairseq
    NamePattern(r"token_type_ids", "embeddings.token_type_ids"),  # BERT
    NamePattern(r"num_batches_tracked", "encoder.norm.num_batches_tracked"),  # batch normalization
    NamePattern(r"relative_position_index", "encoder.layer.0.attention.relative_position_index"),  # Swin, BEiT
    NamePattern(r"relative_coords_table", "encoder.layer.0.attention.relative_coords_table"),  # Swin v2
    NamePattern(r"(?:sqrt_\w*|log_one_minus_)?alphas_cumprod(?:_prev)?", "alphas_cumprod"),  # Stable Diffusion
    NamePattern(r"betas", "betas"),
    NamePattern(r"posterior_(?:variance|log_variance_clipped|mean_coef[12])", "posterior_variance"),
    NamePattern(r"lvlb_weights", "lvlb_weights"),
    NamePattern(r"(?:log_)?sigmas", "denoiser.sigmas"),
    NamePattern(r"num_updates", "model_ema.num_updates"),
    NamePattern(r"_float_tensor", "model.decoder.embed_positions._float_tensor"),  # fairseq
)
"""Last components of the names of buffers: tensors that are not parameters."""

MASKED_ATTENTION = (
    NamePattern(r"attn", "transformer.h.0.attn.bias"),  # GPT-2
    NamePattern(r"attention", "gpt_neox.layers.0.attention.bias"),  # GPT-NeoX
    NamePattern(r"self_attn", "model.layers.0.self_attn.bias"),
    NamePattern(r"self_attention", "transformer.h.0.self_attention.bias"),
    NamePattern(r"crossattention", "transformer.h.0.crossattention.bias"),  # GPT-2 with cross-attention
)
"""Modules whose ``bias`` is a causal mask if its shape is (1, 1, n, n)."""

AFTER_LAYERS = (
    NamePattern(r"(?:\w*_)?heads?", "lm_head.bias"),
    NamePattern(r"score", "score.weight"),  # sequence classification
    NamePattern(r"(?:\w*_)?classifier", "classifier.weight"),
    NamePattern(r"(?:\w*_)?pooler", "pooler.dense.weight"),  # BERT
    NamePattern(r"cls", "cls.predictions.bias"),  # BERT
    NamePattern(r"\w*unembed\w*", "unembed.weight"),
    NamePattern(r"(?:\w*_)?logits?(?:_\w+)?", "final_logits_bias"),  # BART
    NamePattern(r"(?:\w*_)?outputs?(?:_\w+)?", "output.weight"),
    NamePattern(r"embed_out", "embed_out.weight"),  # GPT-NeoX
    NamePattern(r"out_proj", "out_proj.weight"),
    NamePattern(r"proj_out", "proj_out.weight"),  # Whisper
    NamePattern(r"head", "head.weight"),  # DeepSeek-V4
    NamePattern(r"project_out", "model.decoder.project_out.weight"),  # OPT
    NamePattern(r"text_projection", "text_projection.weight"),  # CLIP
    NamePattern(r"(?:\w*_)?predictions?", "generator_predictions.dense.weight"),  # ELECTRA
    NamePattern(r"vocab_\w+", "vocab_transform.weight"),  # DistilBERT
    NamePattern(r"lm_loss", "lm_loss.bias"),  # XLNet
    NamePattern(r"pred_layer", "pred_layer.proj.bias"),  # XLM
    NamePattern(r"ff_out", "model.transformer.ff_out.weight"),  # OLMo's own checkpoints
    NamePattern(r"seq_relationship", "cls.seq_relationship.weight"),  # BERT
    NamePattern(r"embedding_norm", "model.embedding_norm.weight"),  # LFM2, where this is the final norm
    NamePattern(r"mlm_\w+", "mlm_head.weight"),
)
"""Components of the names of tensors after the layers."""

BEFORE_LAYERS = (
    NamePattern(r"embed", "model.embed_tokens.weight"),
    NamePattern(r"(?:^|\.)(?:wte|wpe|shared|emb|rotary\w*|rope)(?=\.|$)", "transformer.wpe.weight"),
    NamePattern(r"position", "model.decoder.embed_positions.weight"),
    NamePattern(r"token", "embeddings.token_type_embeddings.weight"),
    NamePattern(r"per_layer", "model.per_layer_projection_norm.weight"),  # Gemma 3n
    NamePattern(r"pre_?la?ye?r_?norm", "vision_model.pre_layrnorm.weight"),  # CLIP, with its misspelling
    NamePattern(r"layernorm_pre", "layernorm_pre.weight"),
    NamePattern(r"ln_pre", "visual.ln_pre.weight"),  # OpenCLIP
    NamePattern(r"norm_pre", "norm_pre.weight"),  # timm
)
"""Parts of the names of tensors before the layers."""

AFTER_LAYERS_BY_DEFAULT = (
    NamePattern(r"\w*(?:norm|(?:^|_|\b)ln)(?:_\w+)?", "model.norm.weight"),
    NamePattern(r"final_\w+", "final_linear.weight"),
    NamePattern(r"merger", "visual.merger.mlp.0.weight"),  # Qwen2-VL
    NamePattern(r"projector", "projector.weight"),
)
"""Components of the names of tensors after the layers, unless `BEFORE_LAYERS` matches."""

VISION = (
    NamePattern(r"vision", "vision_tower.vision_model.embeddings.class_embedding"),
    NamePattern(r"visual", "visual.patch_embed.proj.weight"),
    NamePattern(r"image", "image_newline"),
    NamePattern(r"img", "img_processor.norm.weight"),
    NamePattern(r"vit", "vit.norm.weight"),
    NamePattern(r"vpm", "vpm.post_layernorm.weight"),  # MiniCPM-V
    NamePattern(r"sam", "model.sam_model.patch_embed.proj.weight"),
    NamePattern(r"video", "video_tower.norm.weight"),
)
"""Words in the names of vision encoders."""

OTHER_INPUTS = (
    NamePattern(r"audio", "audio_tower.conv1.weight"),
    NamePattern(r"apm", "apm.conv1.weight"),  # MiniCPM-o
    NamePattern(r"speech", "speech_encoder.norm.weight"),
    NamePattern(r"acoustic", "acoustic_tokenizer.encoder.weight"),
    NamePattern(r"conformer", "conformer.norm.weight"),
    NamePattern(r"qformer", "qformer.query_tokens"),  # BLIP-2
    NamePattern(r"resampler", "resampler.query"),  # MiniCPM-V
    NamePattern(r"(?<!vocab_)projector", "multi_modal_projector.linear_1.weight"),
    NamePattern(r"connector", "model.connector.modality_projection.proj.weight"),  # Idefics3
    NamePattern(r"aligner", "aligner.layers.0.weight"),  # Janus
    NamePattern(r"merger", "visual.merger.ln_q.weight"),  # Qwen2-VL
)
"""Words in the names of other modules that produce inputs of the language model."""

SIDE_OUTPUTS = (
    NamePattern(r"mtp", "mtp.fc.weight"),  # multi-token prediction
    NamePattern(r"nextn", "nextn.norm.weight"),
    NamePattern(r"eagle", "eagle.fc.weight"),
    NamePattern(r"medusa", "medusa_head.0.weight"),
    NamePattern(r"talker", "talker.model.norm.weight"),  # Qwen2.5-Omni
    NamePattern(r"depth_decoder", "depth_decoder.norm.weight"),  # Moshi
    NamePattern(r"codec", "codec_model.weight"),
    NamePattern(r"token2wav", "token2wav.weight"),  # Qwen2.5-Omni
    NamePattern(r"code2wav", "code2wav.weight"),  # Qwen3-Omni
)
"""Words in the names of modules next to the language model that use its output."""

LANGUAGE = (
    NamePattern(r"text", "model.text_model.norm.weight"),
    NamePattern(r"language", "language_model.model.norm.weight"),
    NamePattern(r"llm", "llm.model.norm.weight"),  # MiniCPM-V
    NamePattern(r"lm", "lm.model.norm.weight"),
    NamePattern(r"thinker", "thinker.model.norm.weight"),  # Qwen2.5-Omni
    NamePattern(r"decoder", "decoder.final_layer_norm.weight"),
)
"""Words in the names of language models among other modules."""


def any_of(*tables: tuple[NamePattern, ...]) -> str:
    """A regular expression that matches any entry of some tables, without anchors."""
    return "(?:" + "|".join(entry.pattern for table in tables for entry in table) + ")"


def component(*tables: tuple[NamePattern, ...]) -> str:
    """A regular expression for one or more complete components of a name."""
    return rf"(?:^|\.){any_of(*tables)}(?=\.|$)"


def word(*tables: tuple[NamePattern, ...]) -> str:
    """A regular expression for a word of a name: not a part of a longer word, but possibly one of several."""
    return rf"(?<![a-z]){any_of(*tables)}(?![a-z])"
