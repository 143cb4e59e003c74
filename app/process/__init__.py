"""The server process: settings, start, self-test and shutdown."""
