"""Ahead of running: plans for models and lengths that nobody runs."""
