"""A small RTSP server for tests: one client at a time, one film again and again, pictures by RTP over UDP or TCP.

FFmpeg makes the RTP packets; over TCP they are relayed into the RTSP connection.
"""

import contextlib
import re
import socket
import threading
import time

import av

from tests.tiny_engine import picture

MPEG_VIDEO = 32
"""RTP's number for MPEG video, which needs no further description."""


class RtspServer:
    """Serves pictures that differ at ``rate`` frames a second while its context lasts."""

    def __init__(self, rate: int = 25) -> None:
        self.rate = rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._clients: list[socket.socket] = []
        self._running = True
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def address(self) -> str:
        return f"rtsp://127.0.0.1:{self._listener.getsockname()[1]}/camera"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._running = False
        self.hang_up()
        self._listener.close()

    def hang_up(self) -> None:
        """Cut every connection, as a camera does that loses its power."""
        while self._clients:
            client = self._clients.pop()
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            client.close()

    def _accept(self) -> None:
        while self._running:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), client.makefile("rb") as lines:
            while True:
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    if not (line := lines.readline()):
                        return
                    request += line
                method, number = request.split()[0].decode(), re.search(rb"CSeq: (\d+)", request)
                assert number is not None
                self._answer(client, method, number[1].decode())
                if method == "PLAY":
                    threading.Thread(target=self._play, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket, method: str, number: str) -> None:
        head = {"OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"}
        head["SETUP"] = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1"
        head["PLAY"] = head["TEARDOWN"] = "Session: 1"
        body = ""
        if method == "DESCRIBE":
            body = f"v=0\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP {MPEG_VIDEO}\r\na=control:track\r\n"
            head["DESCRIBE"] = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}"
        client.sendall(f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\n{head[method]}\r\n\r\n{body}".encode())

    def _play(self, client: socket.socket) -> None:
        """Let FFmpeg send RTP to a socket here, and pass each packet on within the connection."""
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(0.02)
        target = f"rtp://127.0.0.1:{receiver.getsockname()[1]}?pkt_size=1300"
        with contextlib.suppress(OSError), receiver, av.open(target, "w", format="rtp") as output:
            stream = output.add_stream("mpeg1video", rate=25)
            stream.width = stream.height = 64
            stream.gop_size = 5
            for index in range(100_000):
                frame = av.VideoFrame.from_image(picture(index % 50, (64, 64)))
                frame.pts = index
                output.mux(stream.encode(frame))
                end = time.monotonic() + 1 / self.rate
                while time.monotonic() < end:
                    with contextlib.suppress(TimeoutError):
                        packet = receiver.recv(2048)
                        client.sendall(b"$\0" + len(packet).to_bytes(2, "big") + packet)
