"""What goes wrong with fine-tuning or its data; each message says what was expected, what came and what to do."""


class FinetuneError(Exception):
    """Fine-tuning cannot be done as asked."""


class SentencesError(FinetuneError):
    """Sentences cannot be read, or are too few for the sizes asked for."""
