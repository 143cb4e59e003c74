"""Errors of fine-tuning and its data; each message says what was expected, what came and what to do."""


class FinetuneError(Exception):
    """Fine-tuning cannot run as requested."""


class SentencesError(FinetuneError):
    """Sentences cannot be read, or are too few for the requested sizes."""
