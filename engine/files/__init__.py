"""The non-weight files of a model directory: config.json, tokenizer, chat templates, model card."""
