"""Compares vLLM's h with transformers' on tiny random models of many families: `python -m benchmarks.zoo`."""
