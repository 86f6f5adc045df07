"""Names of files that belong to a model next to its weights."""

TOKENIZER = """added_tokens.json additional_chat_templates/tools.jinja bpe.codes chat_template.jinja
    chat_template.json chat_templates/default.jinja merges.txt normalizer.json qwen.tiktoken sentencepiece.bpe.model
    source.spm special_tokens_map.json spiece.model tekken.json tiktoken.model tokenizer.json tokenizer.model
    tokenizer.model.v3 tokenizer_config.json vocab.json vocab.txt"""
OTHER = """LICENSE LICENSE-MODEL LICENSE.md MODEL_LICENSE NOTICE USE_POLICY.md config_sentence_transformers.json
    Notice.txt modules.json preprocessor_config.json processor_config.json sentence_bert_config.json
    sentence_xlm-roberta_config.json video_preprocessor_config.json"""
