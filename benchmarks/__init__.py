"""What the project claims, measured: each module runs as `python -m benchmarks.NAME`."""
