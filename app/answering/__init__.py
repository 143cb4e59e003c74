"""Answering: a request resolved against the policy, generated, scored and decided."""
