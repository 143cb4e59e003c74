"""Which answers are right."""


def same_number(response: str, reference: str) -> bool:
    """Leading zeros and white space aside."""
    return response.strip().isdecimal() and int(response) == int(reference)
