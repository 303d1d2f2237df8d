"""Everything that reads a model: configuration, weights, tokenizer, chat template, download, forward pass."""
