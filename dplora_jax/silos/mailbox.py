"""The embedded engine: sites' relays fetch requests from the coordinator and bring replies, over TLS with certificates on
both sides.

The coordinator listens; a site opens no port. Both know the other's certificate from the plan, and trust no authority.
Frames have a largest size, and every read and handshake an end.
"""

import contextlib
import hashlib
import socket
import socketserver
import ssl
import threading
import time

from dplora_jax.silos import frames

HANDSHAKE, POLL, SILENCE = 10.0, 15.0, 60.0  # seconds: for a handshake; that a poll may last; that a peer may be silent
HANDSHAKES, CONNECTIONS = 32, 4  # at a time: of anyone, and of one site
PAUSES = 0.1, 0.5, 2.0, 5.0  # seconds between a relay's attempts to connect


@contextlib.contextmanager
def serving(office, address, key, certificate, sites, most):
    """Listen at `address` (host, port) as a context -> the port. `key` and `certificate` are the coordinator's PEM files, `sites`
    the sites' certificates (PEM), in the order of their numbers, and `most` the most bytes of a reply."""
    numbers = {hashlib.sha256(ssl.PEM_cert_to_DER_cert(text)).digest(): site for site, text in enumerate(sites)}
    context = _context(ssl.PROTOCOL_TLS_SERVER, key, certificate, sites)
    handshakes = threading.BoundedSemaphore(HANDSHAKES)
    places = [threading.BoundedSemaphore(CONNECTIONS) for _ in sites]

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):  # the other side's: it comes again
                self.request.settimeout(HANDSHAKE)
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with _place(handshakes) as free:
                    connection = context.wrap_socket(self.request, server_side=True) if free else None
                if connection is not None:
                    with connection:
                        self._serve(connection)

        def _serve(self, connection):
            site = numbers.get(hashlib.sha256(connection.getpeercert(binary_form=True)).digest())
            if site is None:
                return
            with _place(places[site]) as free:
                connection.settimeout(SILENCE)
                while free and (reply := frames.receive(connection, most)) is not None:
                    frames.send(connection, office.exchange(site, reply, POLL))

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address, daemon_threads, block_on_close, request_queue_size = True, True, False, 128

        def handle_error(self, request, client_address):
            """A connection that failed is the other side's."""

    with Server(address, Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


@contextlib.contextmanager
def _place(places):
    """Whether one of the `places`, a semaphore, was free; it is taken until the context ends."""
    free = places.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            places.release()


def relay(address, key, certificate, coordinator, answer, most, stop=lambda: False, say=lambda text: None):
    """A site's relay, until `stop()`: fetch requests of at most `most` bytes from the coordinator at `address`, and bring
    back what `answer(request)` gives. `coordinator` is its certificate (PEM). Where the coordinator or the site's process
    is away, it tries again."""
    context, failures, reply = _context(ssl.PROTOCOL_TLS_CLIENT, key, certificate, [coordinator]), 0, b""
    while not stop():
        try:
            with (
                socket.create_connection(address, HANDSHAKE) as plain,
                context.wrap_socket(plain, server_hostname=None) as connection,
            ):
                connection.settimeout(SILENCE)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while not stop():
                    frames.send(connection, reply)
                    request, reply = frames.receive(connection, most), b""
                    if request is None:
                        raise frames.FrameError("the coordinator has ended the connection")
                    failures = 0
                    if request:
                        reply = answer(request)
        except OSError as error:
            say(f"trying again ({type(error).__name__}: {error.strerror or error})")
            time.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
            failures += 1


def _context(protocol, key, certificate, trusted):
    """TLS 1.3 under this certificate, with peers whose own is one of those `trusted` (PEM)."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # peers are known by their certificate itself
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(cadata="\n".join(trusted))
    return context
