"""Zeroth-order fine-tuning of low-bit language models through fused linear kernels, at the price of inference."""

__version__ = "0.1.0"
