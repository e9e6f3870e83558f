"""GGUF, the one-file format of llama.cpp: read and write."""

from lalia.formats.gguf.export import Saved, convert_folder, save_gguf
from lalia.formats.gguf.file import GGUFFile

__all__ = ["GGUFFile", "Saved", "convert_folder", "save_gguf"]
