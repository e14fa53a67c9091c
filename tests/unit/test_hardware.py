import pytest

from mosaicbert.train.hardware import DEVICES, find_device


@pytest.mark.parametrize(
    ("name", "tflops", "gb_per_second"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 3350),
        ("NVIDIA H100 PCIe", 756.5, 2000),
        ("NVIDIA H200", 989.4, 4800),
        ("NVIDIA B200", 2250, 8000),
        ("NVIDIA A100-SXM4-80GB", 312, 2039),
        ("NVIDIA A100-SXM4-40GB", 312, 1555),
        ("NVIDIA A100-PCIE-40GB", 312, 1555),
        ("NVIDIA L4", 121, 300),
        ("NVIDIA L40S", 362, 864),
        ("NVIDIA GeForce RTX 3090", 71, 936),
        ("NVIDIA GeForce RTX 3090 Ti", 80, 1008),
        ("NVIDIA GeForce RTX 4090", 165.2, 1008),
        ("NVIDIA GeForce RTX 5090", 209.5, 1792),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 960),
        ("Tesla V100-SXM2-16GB", 125, 900),
        ("H100", 989.4, 3350),
        ("a100", 312, 2039),
    ],
)
def test_known_names(name, tflops, gb_per_second):
    device = find_device(name)
    assert device is not None
    assert device.flops == pytest.approx(tflops * 1e12)
    assert device.bandwidth == pytest.approx(gb_per_second * 1e9)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "NVIDIA",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce GTX 1080",
    ],
)
def test_unknown_names_have_no_figure(name):
    assert find_device(name) is None


def test_every_row_is_found_by_its_own_name():
    for device in DEVICES:
        assert find_device(device.name) == device
        assert find_device("NVIDIA " + device.name) == device
