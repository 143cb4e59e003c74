"""Writing: answers and verdicts in OpenAI's form."""
