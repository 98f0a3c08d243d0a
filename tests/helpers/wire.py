"""A wire between two network namespaces that can be slow, lossy or cut: `tc netem` in plain Python.

``python wire.py PID ADDRESS PID ADDRESS`` makes a TUN device in the network namespace of each of two processes, and
carries packets between them. Lines on standard input change it: ``delay 0.05`` (seconds each way), ``loss 0.1`` (share
of packets), ``cut``, ``heal``; ``dropped`` asks for the number of packets lost so far. It ends with its standard input.
"""

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET = 65536  # bytes, more than any


def _end(pid: str, address: str) -> int:
    """Returns the file of a new TUN device called "wire" in the network namespace of a process."""
    space = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(space, 0):
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace of process {pid}")
    os.close(space)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)  # belongs to the namespace of now
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TUN | _IFF_NO_PI))
    for words in (f"address add {address}/24 dev wire", "link set wire up"):
        subprocess.run(["ip", *words.split()], check=True)
    return device


class Wire:
    """Carries packets from each of two files to the other."""

    def __init__(self, ends: tuple[int, int], seed: int = 0) -> None:
        self._other = {ends[0]: ends[1], ends[1]: ends[0]}
        self._delay, self._loss, self._dropped = 0.0, 0.0, 0
        self._draw, self._count = random.Random(seed), itertools.count()
        self._due: list[tuple[float, int, int, bytes]] = []

    def run(self) -> None:
        """Until the end of standard input."""
        poll = select.poll()
        for file in (0, *self._other):
            poll.register(file, select.POLLIN)
        while True:
            wait = None if not self._due else max(0.0, self._due[0][0] - time.monotonic()) * 1e3
            for file, _ in poll.poll(wait):
                if file != 0:
                    self._take(file)
                elif not self._obey(os.read(0, 4096).decode()):
                    return
            self._deliver()

    def _obey(self, text: str) -> bool:
        """Returns whether there may be more to obey."""
        for line in text.splitlines():
            match line.split():
                case ["delay", seconds]:
                    self._delay = float(seconds)
                case ["loss", share]:
                    self._loss = float(share)
                case ["cut"]:
                    self._loss = 1.0
                case ["heal"]:
                    self._loss = 0.0
            print(self._dropped if line == "dropped" else line, flush=True)
        return bool(text)

    def _take(self, file: int) -> None:
        """Reads all packets that wait at one end."""
        while True:
            try:
                packet = os.read(file, _PACKET)
            except BlockingIOError:
                return
            if self._draw.random() < self._loss:
                self._dropped += 1
                continue
            at = time.monotonic() + self._delay
            heapq.heappush(self._due, (at, next(self._count), self._other[file], packet))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            *_, file, packet = heapq.heappop(self._due)
            os.write(file, packet)


if __name__ == "__main__":
    first, second = _end(*sys.argv[1:3]), _end(*sys.argv[3:5])
    wire = Wire((first, second))
    print("up", flush=True)
    wire.run()
