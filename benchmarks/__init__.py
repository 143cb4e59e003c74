"""Measures what the project claims. Each module runs as `python -m benchmarks.NAME`."""
