"""Calls that own their inputs (``generate()``, ``Session``, plans ahead): what they depend on is known by hash."""
