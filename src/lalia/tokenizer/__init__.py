"""Tokenizers: byte-level BPE training, every kind of text tokenizer, chat templates with loss masks, streaming."""
