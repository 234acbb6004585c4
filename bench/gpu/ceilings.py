"""What the machine can do: copy, products, an empty launch. Floors of other rows are in these units."""

from __future__ import annotations

import sys

import torch

from . import table
from .machine import Device, Record, arguments, reason


def copy_rate(device: Device, dry: bool) -> float:
    """Bytes per second of a copy, each byte counted where it is read and where it is written."""
    x = torch.zeros(2**20 if dry else 2**30, dtype=torch.uint8, device=device.name)
    y = torch.empty_like(x)
    median, *_ = device.seconds(lambda: y.copy_(x), calls=1 if dry else 5)
    return 2 * x.numel() / median


def product_rate(device: Device, dry: bool, dtype: torch.dtype, precision: str = "highest") -> float:
    """Flops per second of a square product, with fp32 sums; of bf16 into fp32 where torch has it."""
    n = 64 if dry else 8192
    a, b = (torch.randn(n, n, device=device.name).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        if dtype == torch.bfloat16 and device.cuda:
            median, *_ = device.seconds(lambda: torch.ops.aten.mm.dtype(a, b, torch.float32), calls=3, rounds=5)
        else:
            median, *_ = device.seconds(lambda: torch.mm(a, b), calls=1 if dry else 2, rounds=5)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * n**3 / median


def launch(device: Device) -> float:
    """Seconds between the starts of tiny kernels that torch launches one by one."""
    x = torch.zeros(1, device=device.name)
    return device.seconds(lambda: x.add_(1), calls=100)[0]


def replay(device: Device) -> float:
    """Seconds of a tiny kernel inside a CUDA graph of a hundred."""
    x = torch.zeros(1, device=device.name)

    def run() -> tuple[torch.Tensor, ...]:
        for _ in range(100):
            x.add_(1)
        return (x,)

    again, _ = device.captured(run)
    return device.seconds(again, calls=5)[0] / 100


def main() -> int:
    device, path, dry, _ = arguments()
    record, status = Record(path, "ceilings"), 0
    measures = {
        "copy": (lambda: copy_rate(device, dry), "B/s"),
        "sgemm": (lambda: product_rate(device, dry, torch.float32), "flop/s"),
        "tf32 product": (lambda: product_rate(device, dry, torch.float32, "high"), "flop/s"),
        "bf16 product": (lambda: product_rate(device, dry, torch.bfloat16), "flop/s"),
        "launch": (lambda: launch(device), "s"),
        "replayed kernel": (lambda: replay(device), "s"),
    }
    for name, (measure, unit) in measures.items():
        try:
            measure()  # the first call starts libraries
            record.row(name, value=measure(), unit=unit)
        except Exception as error:
            status = table.FOUND
            record.row(name, False, note=reason(error))
    return status


if __name__ == "__main__":
    sys.exit(main())
