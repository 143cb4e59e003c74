"""Thin handlers: a request in, a response out; the work is done in `app.answering.service`."""
