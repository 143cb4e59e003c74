"""Thin handlers from request to response; `app.answering.service` does the work."""
