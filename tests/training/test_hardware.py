"""Peaks by exact name, and a measured one."""

import pytest
import torch

from lalia.training.hardware import DATASHEETS, datasheet_flops, find_datasheet, measured_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks(name: str, tflops: float) -> None:
    assert datasheet_flops(name, "bfloat16") == datasheet_flops(name, "float16") == pytest.approx(tflops * 1e12)
    assert datasheet_flops(name, "float32") is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "AMD EPYC",
        "NVIDIA L40",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H200 NVL",
        "NVIDIA H800",
        "NVIDIA A100X",
    ],
)
def test_a_device_that_only_resembles_one_has_no_peak(name: str) -> None:
    assert find_datasheet(name) is None
    assert datasheet_flops(name, "bfloat16") is None


def test_every_name_that_a_message_lists_is_found() -> None:
    for _, sheet in DATASHEETS:
        assert find_datasheet(sheet.name) == sheet


def test_a_measured_peak_is_more_than_any_single_product_shows() -> None:
    peak = measured_flops(torch.device("cpu"), "float32", seconds=0.05, size=128)
    assert 1e7 < peak < 1e14
