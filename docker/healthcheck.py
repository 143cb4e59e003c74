"""The image's health check: asks the server in this container whether it is ready. Exit code 0 if it is.

It knows from the server's own settings whether to speak HTTPS, and which address it listens on. A certificate is
not checked: it names the service, not this container's loopback address.
"""

from __future__ import annotations

import os
import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection

TIMEOUT_S = 4


def main() -> int:
    host, port = os.environ.get("CANDOR_HOST", "127.0.0.1"), int(os.environ.get("CANDOR_PORT", "8000"))
    host = {"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(host, host)
    if os.environ.get("CANDOR_TLS_CERTIFICATE"):
        context = ssl._create_unverified_context()
        connection: HTTPConnection = HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    else:
        connection = HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("HEAD", "/readyz")
        return 0 if connection.getresponse().status == 200 else 1
    except (OSError, HTTPException) as error:
        print(f"not ready: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
