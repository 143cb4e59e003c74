"""The process: settings, start, self-test and end."""
