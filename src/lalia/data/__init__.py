"""From files to documents to token shards: sources, cleaning, split, data card, packing and loading."""
