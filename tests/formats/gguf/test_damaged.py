"""Damaged and hostile files: each is refused with words, within bounded memory."""

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from lalia.errors import CorruptFile, UserError
from lalia.formats.gguf import GGUFFile
from lalia.formats.gguf.quantize import quantize

NUM_MUTATIONS = 1000
MEMORY_BOUND = 2_000_000
"""Bytes allocated beyond the file's size."""


def write(path: Path, architecture: str = "llama") -> Path:
    """A small valid file, by the gguf package."""
    import torch

    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(8)
    writer.add_bool("some.flag", True)
    writer.add_float64("some.double", 0.5)
    writer.add_array("some.flags", [True, False])
    writer.add_array("some.floats", [0.5, 1.5, 2.5])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i} \u00e9" for i in range(16)])
    writer.add_token_types([1] * 16)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    rng = np.random.default_rng(0)
    norm = np.ones(32, np.float32)
    for name, shape in {
        "token_embd.weight": (16, 32),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name == "token_embd.weight":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            from gguf import GGMLQuantizationType

            packed = quantize("Q4_1", torch.from_numpy(values)).numpy()
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q4_1)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def use(path: Path) -> None:
    """Everything that a loader does with a file."""
    file = GGUFFile(path)
    file.config_values()
    for name in file.names():
        tensor = file.tensor(name)
        # 84 bytes of Q2_K are 256 float32, the most that a byte can become. tracemalloc does not see tensors.
        assert tensor.shape == file.shape(name) and tensor.nbytes <= 13 * path.stat().st_size
        if file.kind(name) != "F32":
            file.blocks(name)


@pytest.fixture
def valid(tmp_path: Path) -> bytes:
    content = write(tmp_path / "valid.gguf").read_bytes()
    use(tmp_path / "valid.gguf")
    return content


def _number_at(content: bytes, name: str, skip: int, form: str, number: int) -> bytes:
    """The file with the number that stands `skip` bytes behind a key or tensor name replaced."""
    at = content.index(name.encode()) + len(name) + skip
    return content[:at] + struct.pack(form, number) + content[at + struct.calcsize(form) :]


EMBEDDING, QUERY = (
    "token_embd.weight",
    "blk.0.attn_q.weight",
)  # behind the name: 4 bytes of rank, 8 a size, kind, offset
HEADS = "llama.attention.head_count"
DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "empty": ("empty", lambda c: b""),
    "another format": ("does not begin with GGUF", lambda c: b"PK\x03\x04" + c[4:]),
    "only a magic": ("does not begin with GGUF", lambda c: c[:4]),
    "version 1": ("version 1;", lambda c: c[:4] + struct.pack("<I", 1) + c[8:]),
    "version 99": ("version 99;", lambda c: c[:4] + struct.pack("<I", 99) + c[8:]),
    "big-endian": ("big-endian", lambda c: c[:4] + struct.pack(">I", 3) + c[8:]),
    "absurd number of tensors": ("claims .* tensors", lambda c: c[:8] + struct.pack("<Q", 1 << 60) + c[16:]),
    "absurd number of entries": ("claims .* metadata", lambda c: c[:16] + struct.pack("<Q", 1 << 40) + c[24:]),
    "header cut": ("ends", lambda c: c[:600]),
    "data cut": ("behind the end of the file", lambda c: c[:-64]),
    "offset past the end": ("behind the end", lambda c: _number_at(c, QUERY, 24, "<Q", 1 << 40)),
    "offset near 2^64": ("behind the end", lambda c: _number_at(c, QUERY, 24, "<Q", (1 << 64) - 32)),
    "misaligned offset": ("multiple of 32", lambda c: _number_at(c, QUERY, 24, "<Q", 33)),
    "overlap": ("overlap", lambda c: _number_at(c, QUERY, 24, "<Q", 0)),
    "zero dimension": ("no values", lambda c: _number_at(c, QUERY, 12, "<Q", 0)),
    "shape overflow": ("2\\^63", lambda c: _number_at(c, QUERY, 12, "<Q", 1 << 60)),
    "large shape": ("behind the end", lambda c: _number_at(c, QUERY, 12, "<Q", 1 << 40)),
    "rows that blocks do not divide": ("no multiple", lambda c: _number_at(c, QUERY, 4, "<Q", 31)),
    "no dimensions": ("0 dimensions", lambda c: _number_at(c, QUERY, 0, "<I", 0)),
    "many dimensions": ("dimensions", lambda c: _number_at(c, QUERY, 0, "<I", 1 << 31)),
    "kind that is not read": ("IQ2_XXS", lambda c: _number_at(c, QUERY, 20, "<I", 16)),
    "unknown kind": ("unknown", lambda c: _number_at(c, QUERY, 20, "<I", 12345)),
    "two tensors of one name": ("two tensors", lambda c: c.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight")),
    "two keys of one name": ("twice", lambda c: c.replace(b"some.double", b"some.floats")),
    "unknown type": ("unknown type", lambda c: _number_at(c, "some.flag", 0, "<I", 77)),
    "flag that is none": ("flag other than", lambda c: _number_at(c, "some.flag", 4, "<B", 2)),
    "string past the end": ("ends after", lambda c: _number_at(c, "tokenizer.chat_template", 4, "<Q", 1 << 50)),
    "key past the end": ("ends after", lambda c: _number_at(c, "", 24, "<Q", 1 << 63)),
    "array past the end": ("ends after|can hold", lambda c: _number_at(c, "some.floats", 8, "<Q", 1 << 60)),
    "array of arrays": ("array of arrays", lambda c: _number_at(c, "some.floats", 4, "<I", 9)),
    "array of an unknown type": ("unknown type", lambda c: _number_at(c, "some.floats", 4, "<I", 99)),
    "tokens beyond the file": ("can hold", lambda c: _number_at(c, "tokenizer.ggml.tokens", 8, "<Q", 1 << 62)),
    "token past the end": ("ends after", lambda c: _number_at(c, "tokenizer.ggml.tokens", 16, "<Q", 1 << 62)),
    "no UTF-8": ("no UTF-8", lambda c: c.replace("token 3 \u00e9".encode(), b"token 3 \xff\xff")),
    "template of another type": ("expected text", lambda c: _retype_template(c)),
    "unknown architecture": ("'lmama' is not implemented", lambda c: c.replace(b"\0llama", b"\0lmama")),
    "missing size": ("block_count = None", lambda c: c.replace(b"llama.block_count", b"llama.block_cnunt")),
    "size of another type": ("block_count = ", lambda c: _number_at(c, "llama.block_count", 0, "<I", 6)),
    "zero size": ("head_count = 0", lambda c: _number_at(c, HEADS, 4, "<I", 0)),
    "more layers than tensors": ("block_count", lambda c: _number_at(c, "llama.block_count", 4, "<I", 1 << 30)),
    "heads that do not divide the rows": ("do not divide", lambda c: _number_at(c, HEADS, 4, "<I", 3)),
    "foreign tensor": ("does not have: blk.0.attn_x", lambda c: c.replace(b"blk.0.attn_v", b"blk.0.attn_x")),
}  # fmt: skip


def _retype_template(content: bytes) -> bytes:
    """The template as an array of bytes of the same length: type, element type and count where its length was."""
    text = b"{{ messages }}"
    old = struct.pack("<IQ", 8, len(text)) + text
    return content.replace(old, struct.pack("<IIQ", 9, 0, len(text) - 4) + text[4:])


@pytest.mark.parametrize("damage", DAMAGES)
def test_says_what_is_wrong(damage: str, valid: bytes, tmp_path: Path) -> None:
    message, change = DAMAGES[damage]
    path = tmp_path / "damaged.gguf"
    content = change(valid)
    assert content != valid
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        use(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("position", range(0, 1200, 13))
def test_cut_anywhere(position: int, valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(valid[:position])
    with pytest.raises(CorruptFile):
        use(path)


def test_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(UserError, match="cannot read"):
        GGUFFile(tmp_path)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Flip bytes, cut, insert, repeat, or write an extreme number over part of the file; mostly in the header."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(len(changed), 1600) if rng.random() < 0.9 else len(changed))
        action = rng.randrange(6)
        if action == 0:
            changed[at] = rng.randrange(256)
        elif action == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            form = rng.choice(("<I", "<Q"))
            limit = 1 << 8 * struct.calcsize(form)
            number = rng.choice((0, 1, 2, 7, 8, 9, 12, 255, limit // 2, limit // 2 - 1, limit - 1, limit - 32))
            changed[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif action == 3:
            del changed[at : at + rng.randrange(1, 40)]
        elif action == 4:
            changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
        else:
            changed[at:at] = changed[at : at + rng.randrange(1, 200)]
        if len(changed) < 2:
            break
    return bytes(changed[: rng.randrange(1, len(changed) + 1)] if rng.random() < 0.1 else changed)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """A thousand mutations of three files: no other exception, and memory within the file's size plus a bound."""
    seeds = [write(tmp_path / f"{name}.gguf", name).read_bytes() for name in ("llama", "gemma3", "qwen3")]
    rng = random.Random(20261124)
    path = tmp_path / "mutated.gguf"
    refused = 0
    tracemalloc.start()
    try:
        for number in range(NUM_MUTATIONS):
            content = mutate(seeds[number % len(seeds)], rng)
            path.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                use(path)
            except UserError:
                refused += 1
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < len(content) + MEMORY_BOUND, f"mutation {number} allocated {peak} bytes"
    finally:
        tracemalloc.stop()
    assert NUM_MUTATIONS // 4 < refused < NUM_MUTATIONS  # both outcomes were met
