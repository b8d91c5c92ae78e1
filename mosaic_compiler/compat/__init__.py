"""The one room that names PyTorch's private modules (``kernels/fused.py`` does so for Inductor).

What each name is for, and since which version it is there, stands in ``docs/torch-internals.md``.  Where a version of
PyTorch moves one, this is the place to mend.
"""
