"""Byte strings over a socket, each behind its length, within bounds of size and time. No library but Python's own."""

import contextlib
import os
import pathlib
import socket
import socketserver
import struct
import threading
import time

LENGTH = struct.Struct("<I")
SECONDS = 60.0  # that either side may take for a frame once it has begun
THREADS = 8  # connections that a Unix socket serves at a time, unless more are asked for


class FrameError(ConnectionError):
    """The other side sent something else than a frame of a size that it may have, or went away within one."""


def send(connection, data):
    """Send one frame."""
    connection.sendall(LENGTH.pack(len(data)) + data)  # in one piece: two would wait for an acknowledgement


def receive(connection, most):
    """One frame of at most `most` bytes; None where the other side has ended. Raises FrameError, before any of a frame that
    is too large is held."""
    head = _exactly(connection, LENGTH.size, None)
    if head is None:
        return None
    (length,), end = LENGTH.unpack(head), time.monotonic() + SECONDS
    if length > most:
        raise FrameError("a frame is too large")
    data = _exactly(connection, length, end)
    if data is None:
        raise FrameError("a frame was cut off")
    return data


def _exactly(connection, count, end):
    """So many bytes by the time `end` (None: within SECONDS of the first); None where there are none at all."""
    data = bytearray()
    while len(data) < count:
        if data and end is None:
            end = time.monotonic() + SECONDS
        if end is not None and time.monotonic() > end:
            raise FrameError("a frame took too long")
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            if data:
                raise FrameError("a frame was cut off")
            return None if count else b""
        data += part
    return bytes(data)


def ask(path, data, most, seconds=None):
    """What the process that listens on the Unix socket `path` answers to `data`; at most `most` bytes, after as long as it
    takes, or at most so many `seconds`. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        connection.connect(str(path))
        send(connection, data)
        answer = receive(connection, most)
    if answer is None:
        raise FrameError("no answer")
    return answer


@contextlib.contextmanager
def listening(path, answer, most, group=None, places=THREADS):
    """Answer on the Unix socket `path` with `answer(data) -> data` for frames of at most `most` bytes, in threads, as a context.
    It serves so many `places` connections at a time, and ends those that are too many.

    The socket's mode is 0600: for this user alone. With a `group` (a name or number) it is that group's too, mode 0660, so that a
    relay of another user can reach it.
    """
    path = pathlib.Path(path)
    path.unlink(missing_ok=True)
    places = threading.BoundedSemaphore(places)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            if not places.acquire(blocking=False):
                return
            try:
                with contextlib.suppress(OSError):  # of the other side, who asks again
                    self.request.settimeout(SECONDS)
                    while (data := receive(self.request, most)) is not None:
                        send(self.request, answer(data))
            finally:
                places.release()

    before = os.umask(0o177)
    try:
        server = _UnixServer(str(path), Handler)
    finally:
        os.umask(before)
    if group is not None:
        os.chown(path, -1, _group(group))
        path.chmod(0o660)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        path.unlink(missing_ok=True)


class _UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # a Unix socket whose queue is full turns away who has a timeout

    def handle_error(self, request, client_address):
        """A connection that failed is the other side's; what failed here is raised where it is waited for."""


def _group(group):
    import grp

    return int(group) if str(group).isdigit() else grp.getgrnam(group).gr_gid
