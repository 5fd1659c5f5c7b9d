# SPDX-License-Identifier: GPL-2.0-or-later
"""The asking end of a link: round trips, answers that are none, deadlines. Over a real socketpair."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from common.disposal import Disposal
from common.errors import PeerGone, ProtocolError
from common.link import Client
from common.mpqemu import BAR, CONFIG, ERROR, SYSMEM, Command, reply_frame, request_frame
from tests.support.fds import await_fds, count_fds, identity, send_fds
from tests.support.unsendable import has_passrights, returns_soon, unsendable_socket
from tests.support.wait import wait_until

CONFIG_READ = request_frame(Command.PCI_CFGREAD, CONFIG.pack(0x3D, 0x11223344, 1))
BAR_WRITE = request_frame(Command.BAR_WRITE, BAR.pack(0xFEDCBA9876543210, 0x1122334455667788, 8, True))
SYNC = request_frame(Command.SYNC_SYSMEM, SYSMEM.pack(*range(1, 25)))
SET_IRQFD = request_frame(Command.SET_IRQFD)

LONG = 60.0
"""a deadline that no test waits for"""


class Asker:
    """A Client, and a peer that does something in its own thread."""

    def __init__(self, deadline: float = LONG, poll_limit: float = 0.0) -> None:
        self.peer, sock = socket.socketpair()
        self.peer.settimeout(LONG)
        self.client = Client(sock, deadline, Disposal(), poll_limit=poll_limit)
        self.client.polling.window = poll_limit
        self._threads: list[threading.Thread] = []

    def peer_does(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action)
        thread.start()
        self._threads.append(thread)

    def answer(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Lets the peer answer the next request."""

        def run() -> None:
            self.peer.recv(100)
            send_fds(self.peer, data, fds)

        self.peer_does(run)

    def close(self) -> None:
        self.client.close()
        for thread in self._threads:
            thread.join()
        self.peer.close()


@contextlib.contextmanager
def open_asker(deadline: float = LONG, poll_limit: float = 0.0) -> Iterator[Asker]:
    before = count_fds()
    asker = Asker(deadline, poll_limit)
    try:
        yield asker
    finally:
        asker.close()
    wait_until(lambda: count_fds() == before, "all fds are closed")


@pytest.fixture
def asker() -> Iterator[Asker]:
    with open_asker() as asker:
        yield asker


class Looking(Client):
    """Counts how often it has looked for an answer without sleeping."""

    looks = 0

    def _look(self, seconds: float | None) -> list[tuple[int, int]]:
        self.looks += seconds == 0
        return super()._look(seconds)


def test_an_answer_is_looked_for_before_it_sleeps() -> None:
    peer, sock = socket.socketpair()
    with peer, contextlib.closing(Looking(sock, LONG, Disposal(), poll_limit=LONG)) as client:
        client.polling.window = LONG

        def answer() -> None:
            try:
                wait_until(lambda: client.looks > 1, "it looks again and again")
            finally:
                peer.sendall(reply_frame(7))

        thread = threading.Thread(target=answer)
        thread.start()
        assert client.request(Command.PCI_CFGREAD, CONFIG.pack(0, 0, 4)) == 7
        thread.join()
        assert client.polling.found + client.polling.missed == 1


@pytest.mark.parametrize("is_read", [True, False], ids=["end", "reset"])
def test_who_hangs_up_before_the_first_answer_is_named(tmp_path: Path, is_read: bool) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        client = Client.connect(path, LONG)
        peer = listener.accept()[0]

        def hang_up() -> None:
            peer.recv(len(CONFIG_READ) if is_read else 1)
            peer.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        expected = rf"^{path}: \S+\[{os.getpid()}\] closed it at once: another client or transport\?$"
        with pytest.raises(PeerGone, match=expected):
            client.request(Command.PCI_CFGREAD, CONFIG_READ[16:])
        for action in (client.check_quiet, lambda: client.send(Command.DEVICE_RESET)):
            with pytest.raises(PeerGone, match=expected):
                action()
        client.check_quiet = lambda: None  # type: ignore[method-assign]  # it hangs up right after that
        with pytest.raises(PeerGone, match=expected):
            client.send(Command.DEVICE_RESET)
        thread.join()
        client.close()


@pytest.mark.parametrize(
    ("command", "payload", "answer"),
    [
        (Command.PCI_CFGREAD, CONFIG_READ[16:], reply_frame(1)),
        (Command.DEVICE_RESET, b"", struct.pack("<i4xQ", Command.RET, 0)),
    ],
    ids=["value", "empty"],
)
def test_who_hangs_up_after_an_answer_has_served(
    tmp_path: Path, command: Command, payload: bytes, answer: bytes
) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        client = Client.connect(path, LONG)
        with listener.accept()[0] as peer:
            send_fds(peer, answer)
            # Before the request, so that no thread is needed: check_quiet() would find it.
            client.check_quiet = lambda: None  # type: ignore[method-assign]
            assert client.request(command, payload) == (len(answer) > 16)
            del client.check_quiet
            peer.recv(100)
        with pytest.raises(PeerGone, match=r"^the peer closed the link$"):
            client.check_quiet()
        client.close()


def test_round_trip(asker: Asker) -> None:
    seen = []

    def run() -> None:
        seen.append(asker.peer.recv(100))
        send_fds(asker.peer, reply_frame(0x1122334455667788))

    asker.peer_does(run)
    assert asker.client.request(Command.BAR_WRITE, BAR_WRITE[16:]) == 0x1122334455667788
    assert seen == [BAR_WRITE]
    asker.answer(reply_frame(ERROR))
    assert asker.client.request(Command.PCI_CFGREAD, CONFIG_READ[16:]) == ERROR


def test_message_with_fds(asker: Asker) -> None:
    fds = [os.eventfd(0), os.eventfd(0)]
    asker.client.send(Command.SET_IRQFD, fds=fds)
    data, received, _, _ = socket.recv_fds(asker.peer, 100, 8)
    assert data == SET_IRQFD
    assert [identity(fd) for fd in received] == [identity(fd) for fd in fds]
    for fd in fds + received:
        os.close(fd)


def test_reply_byte_by_byte(asker: Asker) -> None:
    def run() -> None:
        asker.peer.recv(100)
        for byte in reply_frame(7):
            send_fds(asker.peer, bytes([byte]))

    asker.peer_does(run)
    assert asker.client.request(Command.DEVICE_RESET) == 7


def test_empty_reply_to_a_reset(asker: Asker) -> None:
    asker.answer(struct.pack("<i4xQ", Command.RET, 0))
    assert asker.client.request(Command.DEVICE_RESET) == 0


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack("<i4xQ", Command.RET, 0),
        struct.pack("<i4xQ", Command.RET, 1000) + bytes(1000),
        struct.pack("<i4xQ", Command.RET, 9) + bytes(9),
        struct.pack("<i4xQQ", Command.PCI_CFGREAD, 8, 0),
        struct.pack("<i4xQQ", 99, 8, 0),
        struct.pack("<i4xQQ", -1, 8, 0),
        reply_frame(1) * 2,
        reply_frame(1) + b"\0",
    ],
    ids=["empty", "size-1000", "size-9", "a-request", "command-99", "command--1", "two", "a-byte-more"],
)
def test_any_answer_but_one_clean_ret(asker: Asker, answer: bytes) -> None:
    asker.answer(answer)
    with pytest.raises(ProtocolError):
        asker.client.request(Command.PCI_CFGREAD, CONFIG_READ[16:])


@pytest.mark.usefixtures("older_kernel")
@pytest.mark.parametrize("count", [1, 8, 253])
def test_ret_with_fds(count: int) -> None:
    with open_asker() as asker:
        fd = os.eventfd(0)
        asker.answer(reply_frame(1), [fd] * count)
        with pytest.raises(ProtocolError, match="file descriptors"):
            asker.client.request(Command.DEVICE_RESET)
        os.close(fd)


@pytest.mark.skipif(not has_passrights(), reason="this kernel knows no SO_PASSRIGHTS")
def test_peers_cant_send_fds(asker: Asker) -> None:
    with pytest.raises(PermissionError):
        send_fds(asker.peer, reply_frame(1), [0])


@pytest.mark.usefixtures("older_kernel")
@pytest.mark.parametrize("flags", [0, socket.MSG_OOB])
@pytest.mark.parametrize("is_read", [True, False])
def test_fds_whose_close_lasts_delay_nobody(flags: int, is_read: bool) -> None:
    """Neither those that come with a RET nor those that are never received."""
    before = count_fds()
    with unsendable_socket() as sock:
        asker = Asker(deadline=LONG)
        send_fds(asker.peer, reply_frame(1), [sock.fileno()], flags)
        sock.close()

        def use() -> None:
            if is_read:
                with pytest.raises(ProtocolError, match="file descriptors"):
                    asker.client.check_quiet()
            asker.client.shutdown()
            asker.client.close()

        assert returns_soon(use)
    asker.close()
    wait_until(lambda: count_fds() == before, "all fds are closed")


@pytest.mark.usefixtures("older_kernel")
def test_who_has_sent_too_many_fds_whose_close_lasts_is_left_alone(tmp_path: Path) -> None:
    before = count_fds()
    with bound(tmp_path / "one") as one, bound(tmp_path / "two") as two, unsendable_socket() as sock:
        client = Client.connect(one.getsockname(), LONG)
        peer, _ = one.accept()
        with peer, open("/dev/null", "rb") as null:
            send_fds(peer, b"x", [sock.fileno()] + 252 * [null.fileno()])
            sock.close()
            for _ in range(3):
                send_fds(peer, b"x", [null.fileno()])
        for _ in range(4):
            with pytest.raises(ProtocolError, match="file descriptors"):
                client.check_quiet()
        client.close()
        with pytest.raises(PeerGone, match="one: too many file descriptors from there"):
            Client.connect(one.getsockname(), LONG)
        Client.connect(two.getsockname(), LONG).close()
    wait_until(lambda: count_fds() == before, "all fds are closed")


def bound(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    return server


def test_late_second_ret_isnt_taken_for_the_next_answer(asker: Asker) -> None:
    asker.answer(reply_frame(1))
    assert asker.client.request(Command.DEVICE_RESET) == 1
    send_fds(asker.peer, reply_frame(2))
    with pytest.raises(ProtocolError, match="an unexpected message"):
        asker.client.request(Command.DEVICE_RESET)


def test_ret_that_nobody_asked_for_stops_a_message_without_reply(asker: Asker) -> None:
    send_fds(asker.peer, b"\1")
    with pytest.raises(ProtocolError, match="an unexpected message"):
        asker.client.send(Command.SYNC_SYSMEM, SYNC[16:])


@pytest.mark.parametrize("poll_limit", [0.0, LONG], ids=["sleeps", "polls"])
def test_silent_peer_costs_the_deadline(poll_limit: float) -> None:
    with open_asker(0.02, poll_limit) as asker, pytest.raises(PeerGone, match=r"within 0\.02 s"):
        asker.client.request(Command.DEVICE_RESET)


def test_deadline_that_has_passed_already_waits_for_nothing() -> None:
    with open_asker(deadline=0) as asker, pytest.raises(PeerGone, match="within 0 s"):
        asker.client.request(Command.DEVICE_RESET)


def test_the_deadline_counts_from_before_the_request_is_sent() -> None:
    """Another process may run in between; the answer is here by the time this one goes on."""
    with open_asker(deadline=0.01) as asker:
        send_fds(asker.peer, reply_frame(1))
        expires = time.monotonic() + 0.02

        def take_long() -> None:
            wait_until(lambda: time.monotonic() > expires, "the deadline has passed")

        asker.client.check_quiet = take_long  # type: ignore[method-assign]  # send() calls it
        with pytest.raises(PeerGone, match=r"within 0\.01 s"):
            asker.client.request(Command.DEVICE_RESET)


def test_dripping_peer_costs_the_deadline() -> None:
    """24 bytes at no less than 10 ms each take longer than the deadline; no byte may extend it."""
    with open_asker(deadline=0.1) as asker:
        enough = threading.Event()

        def drip() -> None:
            asker.peer.recv(100)
            for byte in reply_frame(7):
                if enough.wait(0.01):
                    return
                with contextlib.suppress(OSError):
                    asker.peer.send(bytes([byte]))

        asker.peer_does(drip)
        with pytest.raises(PeerGone, match=r"within 0\.1 s"):
            asker.client.request(Command.DEVICE_RESET)
        enough.set()


def test_peer_that_doesnt_read(asker: Asker) -> None:
    def flood() -> None:
        while True:
            asker.client.send(Command.SYNC_SYSMEM, SYNC[16:])

    with pytest.raises(PeerGone, match="doesn't read"):
        flood()


@pytest.mark.parametrize("sent", [0, 1, 16, 23])
def test_peer_that_closes_instead_of_answering(asker: Asker, sent: int) -> None:
    def run() -> None:
        asker.peer.recv(100)
        asker.peer.send(reply_frame(1)[:sent])
        asker.peer.close()

    asker.peer_does(run)
    with pytest.raises(PeerGone):
        asker.client.request(Command.DEVICE_RESET)


def test_peer_that_has_gone(asker: Asker) -> None:
    asker.peer.close()
    with pytest.raises(PeerGone):
        asker.client.request(Command.DEVICE_RESET)
    with pytest.raises(PeerGone):
        asker.client.send(Command.SET_IRQFD)


def test_shutdown_ends_the_wait_of_another_thread(asker: Asker) -> None:
    def run() -> None:
        asker.peer.recv(100)
        asker.client.shutdown()

    asker.peer_does(run)
    with pytest.raises(PeerGone):
        asker.client.request(Command.DEVICE_RESET)


def test_close_ends_the_link_for_who_has_a_copy(asker: Asker) -> None:
    with socket.socket(fileno=os.dup(asker.client.fileno())) as copy:
        asker.client.close()
        assert asker.peer.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            copy.send(b"x")
        asker.client.close()


def test_who_has_another_copy_goes_on_with_it(asker: Asker) -> None:
    with socket.socket(fileno=os.dup(asker.client.fileno())) as copy:
        asker.client.close_own_copy()
        assert asker.client.fileno() == -1
        copy.send(b"x")
        assert asker.peer.recv(1) == b"x"
        asker.client.close_own_copy()


def test_connect_where_nobody_listens(tmp_path: os.PathLike[str]) -> None:
    before = count_fds()
    path = os.path.join(tmp_path, "socket")
    with pytest.raises(PeerGone, match="socket: No such file"):
        Client.connect(path, LONG)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)
    with pytest.raises(PeerGone, match="socket: Connection refused"):
        Client.connect(path, LONG)
    await_fds(before)


def test_connecting_to_a_full_queue_waits_for_no_place(tmp_path: Path) -> None:
    """As at a remote that hangs: connect(2) would wait for as long as it does."""
    path = str(tmp_path / "full.sock")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(path)
        server.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(path)
        errors: list[PeerGone] = []

        def connect() -> None:
            try:
                Client.connect(path, 0.02)
            except PeerGone as error:
                errors.append(error)

        assert returns_soon(connect)
        assert [str(error) for error in errors] == [f"{path}: takes no connection: others wait already"]
