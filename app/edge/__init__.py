"""The HTTP edge: keys and limits, routes, schemas of requests and responses, and errors."""
