"""The peak that a share of the peak refers to."""

import pytest
import torch

from model.speed import DENSE_PEAKS, device_peak


def test_a_stated_peak_goes_before_all() -> None:
    peak = device_peak(torch.device("cpu"), "bf16", 1.5)
    assert (peak.flops, peak.source) == (1.5e12, "launch.peak_tflops")


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6),
        ("NVIDIA L40S", "bf16", 362),
    ],
)
def test_known_devices_have_the_peak_of_their_data_sheet(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, tflops: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = device_peak(torch.device("cuda"), precision)
    assert peak.flops == tflops * 1e12
    assert "data sheet" in peak.source


def test_an_unknown_device_has_none_and_says_how_to_give_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    peak = device_peak(torch.device("cuda"), "bf16")
    assert peak.flops == 0
    assert "set launch.peak_tflops" in peak.source


def test_a_cpu_is_measured() -> None:
    peak = device_peak(torch.device("cpu"), "fp32")
    # Slower than a pocket calculator or faster than any accelerator would be a broken clock.
    assert 1e7 < peak.flops < max(DENSE_PEAKS["H100"].values())
    assert "1024 x 1024" in peak.source
