"""Benchmarks that need a CUDA device: ``python -m benchmarks.gpu`` runs them all, ``benchmarks.gpu.<name>`` one.

Each prints a table and writes ``benchmarks/results/<name>.json`` with device and versions (``--out`` elsewhere).
"""
