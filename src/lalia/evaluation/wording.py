"""Numbers as people read them, shared by the report and the model card."""

from typing import Any


def count(number: float) -> str:
    """1234567 -> 1,234,567."""
    return f"{number:,.0f}"


def short_count(number: float) -> str:
    """10700000 -> 10.7 million."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return count(number)


def size(num_bytes: float) -> str:
    """Bytes in decimal units: 4743940 -> 4.74 MB."""
    if num_bytes < 0:
        return f"-{size(-num_bytes)}"
    for unit_bytes, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """552.3 -> 9 min 12 s."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def bits_per_byte(value: float) -> str:
    """Three decimals: differences below that are noise between seeds."""
    return f"{value:.3f}"


def plain(value: Any) -> str:
    """Any value of a record as text: yes and no, thousands separators, lists joined by commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def title(key: str) -> str:
    """A record's key as a label: tokens_per_second -> Tokens per second."""
    words = key.replace("_", " ").replace(".", ", ").strip()
    return words.upper() if words in ("cpu", "gpu") else words[:1].upper() + words[1:]


def entry(key: str, value: Any) -> tuple[str, str]:
    """Label and text of a record's entry; a size in bytes gets its unit: memory_bytes=8e9 -> Memory, 8 GB."""
    if key.split("_")[-1] == "bytes" and isinstance(value, int | float):
        return title(key.removesuffix("bytes")) or "Text", size(value)
    return title(key), plain(value)
