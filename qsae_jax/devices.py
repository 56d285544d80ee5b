"""What devices can do, from their makers' data sheets: the rooflines of plans and prices.

Google Cloud's pages on TPU v5e, v5p and v6e; NVIDIA's on H100 SXM and H200 (whose 1,979 teraFLOP/s of bfloat16 are with
sparsity, and whose 900 GB/s of NVLink are of both directions together). float32 products run at the precision of
products.py: on a TPU six bfloat16 passes make one of them, on NVIDIA's cards they leave the tensor cores. The two CPUs
are pairs of cores that this project was measured on, rates as they were reached (experiments/README.md).
"""

from typing import NamedTuple


class Device(NamedTuple):
    """One chip."""

    bf16: float
    """Peak of products of bfloat16, FLOP/s."""
    f32: float
    """Of float32."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes of its memory in a second."""
    link: float
    """Bytes in a second to other chips of its mesh, in one direction."""
    reached: float
    """The share of peaks that is taken to be reached."""


ASSUMED = 0.4
"""Of a peak that was not measured here."""
GiB = 2**30

DEVICES = {
    "TPU v5e": Device(197e12, 197e12 / 6, 16 * GiB, 819e9, 100e9, ASSUMED),
    "TPU v5p": Device(459e12, 459e12 / 6, 95 * GiB, 2765e9, 300e9, ASSUMED),
    "TPU v6e": Device(918e12, 918e12 / 6, 32 * GiB, 1640e9, 224e9, ASSUMED),
    "H100 SXM": Device(989e12, 67e12, 80e9, 3.35e12, 450e9, ASSUMED),
    "H200": Device(989e12, 67e12, 141e9, 4.8e12, 450e9, ASSUMED),
    "2 cores (AVX2)": Device(66e9, 66e9, 24 * GiB, 10e9, 10e9, 1.0),
    "2 cores (AVX-512)": Device(340e9, 340e9, 24 * GiB, 20e9, 20e9, 1.0),
}

MEASURED = tuple(name for name, device in DEVICES.items() if device.reached == 1)
"""Devices whose numbers were reached, and are no peaks."""
