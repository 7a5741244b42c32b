"""A service on a socket, until it is told to stop."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import uvicorn

from zconvert.errors import UserError
from zconvert.serving.server import Service

_SLACK = 5  # seconds that answers have to be sent, once their texts were ended


class Server(uvicorn.Server):
    """uvicorn's server. On SIGINT and SIGTERM it stops listening and gives running texts the time of grace."""

    def __init__(self, service: Service, grace: float, on_ready: Callable[[], None]) -> None:
        """Does not listen yet.

        Args:
            service: what to serve.
            grace: seconds, as in its limits.
            on_ready: called when it listens.
        """
        config = uvicorn.Config(
            service.app(),
            http="h11",  # the one that uvicorn always brings along
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(grace) + _SLACK,
        )
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops, as uvicorn does once it was told to."""
        self._service.stop_soon()
        await super().shutdown(sockets)


def bound(host: str, port: int) -> socket.socket:
    """A socket with its address, which does not listen yet.

    Args:
        host: a name or an address of this machine.
        port: 0: any that is free.

    Raises:
        UserError: it cannot have that address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers share the port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise UserError(
            f"cannot serve at {host}, port {port}",
            found=error.strerror or error,
            fix="choose another --port (0: any that is free), or a --host that is this machine's",
        ) from error
    return made
