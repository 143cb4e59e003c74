"""Tiny random models of many families, and vLLM's h held to transformers' for each: `python -m benchmarks.zoo`."""
