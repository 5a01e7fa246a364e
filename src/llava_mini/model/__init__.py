"""Tensors to logits: no tokenizer, no files."""
