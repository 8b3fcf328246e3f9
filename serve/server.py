"""The server's process: sockets, signals, and an end without losses."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from asyncio.trsock import TransportSocket
from types import FrameType

import uvicorn

from .app import Service, create_app

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5
"""Time for clients to read the ends of their answers once the engine has stopped."""


class Server(uvicorn.Server):
    """A server that drains at its first signal, and stops at the second.

    While it drains, `/health` and new requests get status 503, and running answers go on to their ends.

    Args:
        service: what is served.
        host: address to listen at.
        port: port to listen at; 0 takes a free one.
        drain_seconds: longest time that running answers may take after the signal; what is not finished gets an error.
    """

    def __init__(self, service: Service, host: str, port: int, drain_seconds: float):
        self.service, self.drain_seconds = service, drain_seconds
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=host,
                port=port,
                log_level="warning",
                access_log=False,
                server_header=False,
                http="h11",  # which bounds the head of a request; httptools would be taken where it is installed
                timeout_keep_alive=30,
                timeout_graceful_shutdown=GRACE_SECONDS,
                h11_max_incomplete_event_size=64 * 1024,
                proxy_headers=False,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Warm the engine up, and serve until a signal."""
        # Before uvicorn handles signals, so that they end the warm-up.
        self.service.engine.warm_up()
        super().run(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at a second signal, stop."""
        if self.service.draining:
            self.should_exit = True
        self.service.draining = True

    async def startup(self, sockets: list | None = None) -> None:
        """Listen, and announce the address."""
        await super().startup(sockets)
        if self.started:
            self._drain = asyncio.create_task(self._stop_when_drained())
            for server in self.servers:
                for sock in server.sockets:
                    self._bound_waits(sock)
                    host, port = sock.getsockname()[:2]
                    at = f"[{host}]" if ":" in host else host
                    print(f"serving {self.service.name} at http://{at}:{port}", flush=True)

    def _bound_waits(self, sock: socket.socket | TransportSocket) -> None:
        """Let the system drop connections whose client takes nothing for twice as long as a client may be slow.

        Its answer has ended by then. But what was sent already would wait for it, and keep the connection, for minutes
        where the client vanished without a word, and for ever where it does not read.
        """
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections have the option of the socket that accepts them
            milliseconds = max(int(2000 * self.service.config.client_seconds), 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    async def _stop_when_drained(self) -> None:
        service = self.service
        while not service.draining:
            await asyncio.sleep(0.05)
        end = time.monotonic() + self.drain_seconds
        while service.is_busy and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if service.is_busy:
            logger.warning("stopped after %g seconds with unfinished answers", self.drain_seconds)
            await asyncio.to_thread(service.engine.stop)
        self.should_exit = True
