"""Model folders of the ecosystem: read and write."""
