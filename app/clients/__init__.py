"""HTTP clients of a running server: `candor chat` and `candor batch`. They need no torch."""
