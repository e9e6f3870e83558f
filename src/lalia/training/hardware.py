"""What devices can do at most: from data sheets, by exact name and dtype, and by measurement on the present one."""

import re
import time
from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16", "float8"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Datasheet:
    """What the maker states of a device, dense (no sparsity).

    Attributes:
        name: as people call it.
        half_flops: FLOP/s in bfloat16 and float16 with float32 accumulation.
        memory_bytes: size of the device's memory.
        bandwidth: bytes per second of that memory.
        float8_flops: FLOP/s in float8; None where there is none, or none was looked up.
        link_bandwidth: bytes per second to a neighbour in the same node, one direction; None means over PCIe.
    """

    name: str
    half_flops: float
    memory_bytes: int
    bandwidth: float | None
    float8_flops: float | None = None
    link_bandwidth: float | None = None

    def flops(self, precision: str) -> float | None:
        """Peak FLOP/s in a precision; None where the table has none (float32: it depends on whether TF32 is on)."""
        if precision in ("bfloat16", "float16"):
            return self.half_flops
        return self.float8_flops if precision == "float8" else None


def _sheet(
    name: str,
    tflops: float,
    gib: float,
    gb_per_second: float | None,
    float8_tflops: float | None = None,
    link_gb_per_second: float | None = None,
) -> Datasheet:
    return Datasheet(
        name,
        tflops * 1e12,
        int(gib * 2**30),
        gb_per_second * 1e9 if gb_per_second else None,
        float8_tflops * 1e12 if float8_tflops else None,
        link_gb_per_second * 1e9 if link_gb_per_second else None,
    )


DATASHEETS: tuple[tuple[str, Datasheet], ...] = (
    (r"GB200", _sheet("GB200", 2500, 186, None, link_gb_per_second=900)),
    (r"B200", _sheet("B200", 2250, 180, 8000, link_gb_per_second=900)),
    (r"B100", _sheet("B100", 1800, 180, None, link_gb_per_second=900)),
    (r"H200( SXM5?)?( 141GB)?( HBM3e)?", _sheet("H200", 989, 141, 4800, 1979, 450)),
    (r"H100 NVL", _sheet("H100 NVL", 835, 94, 3900, link_gb_per_second=300)),
    (r"H100( 80GB)? PCIe", _sheet("H100 PCIe", 756, 80, 2000, 1513)),
    (r"H100( SXM5?)?( 80GB)?( HBM3)?", _sheet("H100 SXM", 989, 80, 3350, 1979, 450)),
    (r"A100-SXM4-80GB|A100 80GB( SXM4?)?", _sheet("A100 SXM 80 GB", 312, 80, 2000, link_gb_per_second=300)),
    (r"A100 80GB PCIe|A100-PCIE-80GB", _sheet("A100 PCIe 80 GB", 312, 80, 2000)),
    (r"A100-SXM4-40GB|A100( 40GB)?( SXM4?)?", _sheet("A100 SXM 40 GB", 312, 40, 1600, link_gb_per_second=300)),
    (r"A100-PCIE-40GB|A100 40GB PCIe", _sheet("A100 PCIe 40 GB", 312, 40, 1600)),
    (r"L40S", _sheet("L40S", 362, 48, 864)),
    (r"L4", _sheet("L4", 121, 24, 300)),
    (r"A40", _sheet("A40", 149.7, 48, 696)),
    (r"A30", _sheet("A30", 165, 24, 933)),
    (r"RTX 5090", _sheet("RTX 5090", 209.5, 32, 1790)),
    (r"RTX 4090", _sheet("RTX 4090", 165.2, 24, 1010)),
    (r"RTX 3090", _sheet("RTX 3090", 71, 24, 936)),
    (r"MI300X", _sheet("MI300X", 1307.4, 192, 5300)),
    # The card has 383 TFLOP/s in two dies, and PyTorch shows each die as a device.
    (r"MI250X", _sheet("MI250X (one of two dies)", 191.5, 64, None)),
)
"""Pattern of the whole name that PyTorch reports, without the maker's words, most specific first. Dense bfloat16
peaks and bandwidths as nanochat collected them; float8, memory sizes and links are the makers' as remembered, not
looked up, and serve estimates only. A laptop's or a partitioned device matches nothing."""

MAKERS = re.compile(r"\b(NVIDIA|AMD|Instinct|GeForce|Tesla)\b", re.IGNORECASE)


def find_datasheet(name: str) -> Datasheet | None:
    """The data sheet of a device by its exact name, such as "NVIDIA H100 80GB HBM3", or ours; None if it is not known.

    Whatever remains of the name beyond the pattern ("Laptop GPU", "MIG 1g.10gb") makes it another device.
    """
    words = " ".join(MAKERS.sub(" ", name).split())
    for pattern, sheet in DATASHEETS:
        if re.fullmatch(pattern, words, re.IGNORECASE) or words.lower() == sheet.name.lower():
            return sheet
    return None


def known_devices() -> list[str]:
    """Names for a message that lists them."""
    return [sheet.name for _, sheet in DATASHEETS]


def datasheet_flops(name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device by exact name and precision; None (so no MFU) where it is not known."""
    sheet = find_datasheet(name)
    return sheet.flops(precision) if sheet else None


def device_name(device: torch.device) -> str:
    """Name of a device as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from lalia.devices import cpu_name

    return cpu_name() if device.type == "cpu" else device.type


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measured_flops(device: torch.device, precision: str, seconds: float = 0.3, size: int | None = None) -> float:
    """FLOP/s of the fastest of several square matrix products on the present device: a peak one can reach.

    Args:
        device: where to measure.
        precision: float32, bfloat16 or float16.
        seconds: how long to measure, after one product that warms up.
        size: rows and columns; None means 512 on a CPU, 8,192 elsewhere.
    """
    size = size or (512 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    synchronize(device)
    fastest, until = float("inf"), time.perf_counter() + seconds
    while fastest == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * size**3 / fastest
