"""What a device could do at best, to say how near a training comes to it."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model.linear import product

DENSE_PEAKS = {
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12},
    "L4": {"bf16": 121e12, "fp16": 121e12, "fp32": 30.3e12},
    "4090": {"bf16": 165e12, "fp16": 165e12, "fp32": 82.6e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
    "T4": {"fp16": 65e12, "fp32": 8.1e12},
}
"""Part of a device's name -> precision -> FLOP/s without sparsity, by the maker's data sheets (SXM
where there are several; float32 accumulation)."""
PROBE_WIDTH = 1024
PROBE_SECONDS = 0.15


@dataclass(frozen=True)
class Peak:
    """What one device could do at best."""

    flops: float
    """Per second; 0 where it is not known."""
    source: str


def device_peak(device: torch.device, precision: str, stated_tflops: float = 0.0) -> Peak:
    """Peak of a device: as stated, else by its data sheet, else measured on a CPU."""
    if stated_tflops:
        return Peak(stated_tflops * 1e12, "launch.peak_tflops")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peaks in DENSE_PEAKS.items():
            if part in name.replace("-", " ").split() and precision in peaks:
                return Peak(peaks[precision], f"data sheet of {part}, {precision} dense")
        return Peak(0.0, f"no data sheet for {name} in {precision}; set launch.peak_tflops")
    dtype = torch.float32 if precision == "fp32" else getattr(torch, _DTYPES[precision])
    width = PROBE_WIDTH
    return Peak(
        _measured(device, dtype), f"best product of {width} x {width} matrices, {precision}"
    )


_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.full((PROBE_WIDTH, PROBE_WIDTH), 0.5, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        product(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * PROBE_WIDTH**3 / best


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of a CUDA device by tensors, else by this process; 0 where no kernel tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_bytes()
    except FileNotFoundError:
        return 0
    return int(status.partition(b"VmHWM:")[2].split(maxsplit=1)[0]) << 10


def main() -> None:
    """Print this machine's peak in a precision, FLOP/s: `python -m model.speed bf16`."""
    sys.stdout.write(f"{device_peak(torch.device('cpu'), sys.argv[1]).flops}\n")


if __name__ == "__main__":
    main()
