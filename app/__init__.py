"""The HTTP service: OpenAI's conventions, and with every answer what is known of its reliability."""
