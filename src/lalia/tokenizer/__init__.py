"""The tokenizer: byte-level BPE training and loading, chat templates with loss masks, streaming text."""
