"""Samplers of diffusion LLMs, written so that their graphs show which rows are read."""

from mosaic_compiler.sampling.generation import Generation, generate
from mosaic_compiler.sampling.loop import denoise, transfer_counts
from mosaic_compiler.sampling.step import DenoisingStep, block_window

__all__ = ["DenoisingStep", "Generation", "block_window", "denoise", "generate", "transfer_counts"]
