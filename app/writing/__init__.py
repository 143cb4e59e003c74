"""Rendering of answers and verdicts in OpenAI's format."""
