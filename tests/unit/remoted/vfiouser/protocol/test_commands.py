# SPDX-License-Identifier: GPL-2.0-or-later
"""What the vfio-user specification asks of a server, command by command; interrupts and memory have their own."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import struct

import pytest

from common import pci
from tests.support import vfiouserclient as vfu
from tests.support import vfiouserdevice as device
from tests.support.vfiouserclient import CONFIG_REGION, Refused, VfioUserClient
from tests.support.vfiouserprocess import VfioUserServer, enable_msix, events, fds_of

LARGEST_VERSION_REPLY = 214
"""the size of QEMU 11's own request: it takes no larger reply"""
QEMU_VERSION = (
    b'{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, '
    b'"migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}\0'
)


# VERSION


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}\0",
        b'{"capabilities": {}}\0',
        b'{"capabilities": {"max_msg_fds": 1}}\0',
        b'{"capabilities": {"max_msg_fds": 8, "unheard_of": {"a": [1, null]}}, "other": 1}\0',
        b'{"capabilities": {"write_multiple": true, "twin_socket": {"supported": true}}}\0',
        QEMU_VERSION,
    ],
)
def test_version_is_answered_with_a_subset_of_what_was_proposed(server: VfioUserServer, data: bytes) -> None:
    with server.connect("probe") as client:
        reply = client.call(vfu.VERSION, struct.pack("<HH", 0, 0) + data)
        assert vfu.HEADER.size + len(reply.payload) <= LARGEST_VERSION_REPLY
        assert reply.payload[:4] == bytes(4)
        assert reply.payload[-1] == 0
        capabilities = json.loads(reply.payload[4:-1])["capabilities"]
        assert set(capabilities) <= {
            "max_msg_fds",
            "max_data_xfer_size",
            "max_dma_maps",
            "pgsizes",
            "write_multiple",
        }
        assert 1 <= capabilities["max_msg_fds"] <= 16
        assert capabilities.get("pgsizes", 4096) == 4096
        assert capabilities.get("max_data_xfer_size", 1 << 20) <= 64 << 20
        assert capabilities.get("max_dma_maps", 65535) <= 65535
        assert client.read(CONFIG_REGION, 0) == device.IDENTITY


def test_a_newer_minor_version_is_answered_with_the_servers_own(server: VfioUserServer) -> None:
    with server.connect("probe") as client:
        client.version(minor=7)
        assert client.device_info().regions >= 8


def test_fds_that_come_with_version_are_closed(server: VfioUserServer) -> None:
    with server.connect("probe") as client, events(3) as made:
        client.call(vfu.VERSION, bytes(4), fds_of(made))


VERSIONS = {
    "another major version": struct.pack("<HH", 1, 0) + b"{}\0",
    "no minor version": b"\0\0",
    "nothing": b"",
    "no NUL": bytes(4) + b"{}",
    "a NUL in the middle": bytes(4) + b"{\0}\0",
    "no JSON": bytes(4) + b"{\0",
    "a list": bytes(4) + b"[]\0",
    "capabilities that are a number": bytes(4) + b'{"capabilities": 1}\0',
    "a number without end": bytes(4) + b'{"capabilities": {"max_msg_fds": ' + b"9" * 5000 + b"}}\0",
    "bytes that are no UTF-8": bytes(4) + b'{"capabilities": {"\xff": 1}}\0',
    "a deep list": bytes(4) + b"[" * 60_000 + b"\0",
    "a deep object": bytes(4) + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"\0",
    "a list as deep as fits": bytes(4) + b"[" * 4000 + b"\0",
    "a list within lists": bytes(4) + b"[" * 2000 + b"]" * 2000 + b"\0",
    "not a number": bytes(4) + b"NaN\0",
    "a lone surrogate": bytes(4) + b'"\\ud800"\0',
    "a megabyte": bytes(4) + b'{"a": "' + b"a" * (1 << 20) + b'"}\0',
}


@pytest.mark.parametrize("payload", VERSIONS.values(), ids=VERSIONS)
def test_version_that_cannot_be_agreed_upon_is_refused(server: VfioUserServer, payload: bytes) -> None:
    """And nothing else is done for its client, unless it proposes another one."""
    with server.connect("probe") as client, contextlib.suppress(EOFError, ConnectionError):
        with pytest.raises(Refused):
            client.call(vfu.VERSION, payload)
        with pytest.raises(Refused):
            client.device_info()
    with server.negotiated("probe") as client:
        assert client.read(CONFIG_REGION, 0) == device.IDENTITY


def test_version_twice_costs_the_session_at_most(server: VfioUserServer, client: VfioUserClient) -> None:
    with contextlib.suppress(Refused, EOFError, ConnectionError):
        client.version()
    client.close()
    with server.negotiated("probe") as again:
        assert again.read(CONFIG_REGION, 0) == device.IDENTITY


@pytest.mark.parametrize("command", [*range(2, 14), 15, 16, 17, 18])
def test_nothing_is_done_before_version(server: VfioUserServer, command: int) -> None:
    with server.connect("probe") as client, pytest.raises((Refused, EOFError, ConnectionError)):
        client.call(command, bytes(16))


# GET_INFO, GET_REGION_INFO, GET_IRQ_INFO


def test_device_info(client: VfioUserClient) -> None:
    info = client.device_info()
    assert info.flags == vfu.DEVICE_RESET | vfu.DEVICE_PCI
    assert 8 <= info.regions <= 100  # what QEMU takes
    assert 3 <= info.irqs <= 50


def test_regions(client: VfioUserClient) -> None:
    regions = [client.whole_region_info(index) for index in range(client.device_info().regions)]
    for region in regions:
        if region.fd != -1:
            os.close(region.fd)
    sizes = [region.size for region in regions]
    read_write = vfu.REGION_READABLE | vfu.REGION_WRITABLE
    assert sizes[:3] == [4096, device.SIZE, device.SHARED_BAR]
    assert sizes[3] == 0  # the upper half of BAR 2
    assert sizes[vfu.ROM_REGION] == sizes[vfu.VGA_REGION] == 0
    assert sizes[CONFIG_REGION] == pci.PCI_CONFIG_SIZE
    for region in regions:
        assert region.flags & read_write == (read_write if region.size else 0)
        assert bool(region.flags & vfu.REGION_MMAP) == (region is regions[2])


def test_bar_sizes_agree_with_config_space(client: VfioUserClient) -> None:
    """Of each register that a client sizes by config space, as firmware does."""
    number = 0
    while number < pci.PCI_NUM_BARS:
        region = client.region_info(number)
        if region.fd != -1:
            os.close(region.fd)
        address = pci.PCI_BASE_ADDRESS_0 + 4 * number
        client.write(CONFIG_REGION, address, 0xFFFFFFFF)
        mask = client.read(CONFIG_REGION, address)
        is_io = mask & pci.PCI_BASE_ADDRESS_SPACE_IO
        size = -(mask & ~(3 if is_io else 15)) & 0xFFFFFFFF
        assert size == region.size
        number += 2 if mask & 6 == 4 and not is_io else 1


def test_mappable_area_is_shared_with_the_device(client: VfioUserClient) -> None:
    region = client.whole_region_info(2)
    try:
        assert region.areas == (device.SHARED,)
        start, length = device.SHARED
        with mmap.mmap(region.fd, length, offset=region.offset + start) as area:
            client.write(2, start + 0x20, 0x12345678)
            assert area[0x20:0x24] == b"\x78\x56\x34\x12"
            area[length - 4 : length] = b"end!"
            assert client.read_bytes(2, start + length - 4, 4) == b"end!"
            assert client.read(2, 0x30) == 0x30  # a register beside it
    finally:
        os.close(region.fd)


def test_client_cannot_take_a_mapped_bar_away(client: VfioUserClient) -> None:
    region = client.whole_region_info(2)
    try:
        with pytest.raises(OSError):
            os.ftruncate(region.fd, 0)
        assert client.read(2, device.SHARED[0]) is not None
    finally:
        os.close(region.fd)


def test_shared_memory_is_read_and_written_in_bulk(client: VfioUserClient) -> None:
    """Up to what the server has announced as the largest count."""
    for count in (1, 100, client.most_data):
        data = os.urandom(count)
        client.write_bytes(2, device.SHARED[0], data)
        assert client.read_bytes(2, device.SHARED[0], count) == data


@pytest.mark.parametrize(
    ("command", "size", "argsz"),
    [
        *((vfu.GET_INFO, vfu.QUAD.size, argsz) for argsz in (0, 15)),
        *((vfu.GET_REGION_INFO, vfu.REGION_INFO.size, argsz) for argsz in (0, 16, 31)),
        *((vfu.GET_IRQ_INFO, vfu.QUAD.size, argsz) for argsz in (0, 15)),
    ],
)
def test_reply_that_doesnt_fit_is_refused(
    client: VfioUserClient, command: int, size: int, argsz: int
) -> None:
    with pytest.raises(Refused) as refused:
        client.call(command, struct.pack("<I", argsz) + bytes(size - 4))
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("index", [9, 10, 0x7FFFFFFF, 0xFFFFFFFF])
def test_there_is_no_such_region(client: VfioUserClient, index: int) -> None:
    with pytest.raises(Refused) as refused:
        client.region_info(index)
    assert refused.value.errno == errno.EINVAL


def test_interrupts(client: VfioUserClient) -> None:
    intx = client.irq_info(vfu.INTX)
    assert intx == (vfu.IRQ_EVENTFD | vfu.IRQ_MASKABLE | vfu.IRQ_AUTOMASKED, 1)
    msi, msix = client.irq_info(vfu.MSI), client.irq_info(vfu.MSIX)
    assert msi.vectors == device.MSI_VECTORS
    assert msix.vectors == device.MSIX_VECTORS
    # With NORESIZE QEMU would send all vectors again for each that is added.
    assert msi.flags & msix.flags & (vfu.IRQ_EVENTFD | vfu.IRQ_NORESIZE) == vfu.IRQ_EVENTFD


def test_device_without_a_pin_has_no_intx(server: VfioUserServer) -> None:
    with server.negotiated("pinless") as client, events(1) as made:
        assert [client.irq_info(index).vectors for index in (vfu.INTX, vfu.MSI, vfu.MSIX)] == [0, 0, 0]
        with pytest.raises(Refused):
            client.attach(vfu.INTX, 0, fds_of(made))
        assert client.read(CONFIG_REGION, pci.PCI_INTERRUPT_PIN, 1) == 0
        assert [client.region_info(index).size for index in range(6)] == [0] * 6


@pytest.mark.parametrize("index", [5, 6, 0xFFFFFFFF])
def test_there_is_no_such_kind_of_interrupt(client: VfioUserClient, index: int) -> None:
    with pytest.raises(Refused) as refused:
        client.irq_info(index)
    assert refused.value.errno == errno.EINVAL


# REGION_READ, REGION_WRITE


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("posted", [False, True])
def test_register_of_each_width(client: VfioUserClient, size: int, posted: bool) -> None:
    value = 0x8877665544332211 & (1 << 8 * size) - 1
    client.write(0, device.BYTES + 8, value, size, posted)
    assert client.read(0, device.BYTES + 8, size) == value
    assert client.read(0, device.BYTES + 8, 1) == 0x11


def test_io_bar(client: VfioUserClient) -> None:
    client.write(1, device.SCRATCH, 0xCAFE)
    assert client.read(1, device.SCRATCH) == 0xCAFE


def test_bars_answer_whatever_the_guest_decodes(client: VfioUserClient) -> None:
    """The client decodes: QEMU accesses a BAR by its number, also one that has never had an address."""
    assert client.read(CONFIG_REGION, pci.PCI_COMMAND, 2) == 0
    client.write(0, device.SCRATCH, 77)
    assert client.read(0, device.SCRATCH) == 77


def test_config_space_at_once_and_byte_by_byte(client: VfioUserClient) -> None:
    whole = client.read_bytes(CONFIG_REGION, 0, pci.PCI_CONFIG_SIZE)
    assert whole[:4] == device.IDENTITY.to_bytes(4, "little")
    assert b"".join(client.read_bytes(CONFIG_REGION, at, 1) for at in range(len(whole))) == whole


OUTSIDE = {
    "the last byte and one more": (0, 4095, 2),
    "behind the end": (0, 4096, 4),
    "an offset that wraps": (0, 0xFFFFFFFFFFFFFFFE, 4),
    "the largest offset": (0, 0xFFFFFFFFFFFFFFFF, 1),
    "behind an I/O BAR": (1, device.SIZE - 2, 4),
    "the second half of a BAR": (3, 0, 4),
    "the ROM": (vfu.ROM_REGION, 0, 4),
    "VGA": (vfu.VGA_REGION, 0x3C0, 1),
    "behind config space": (CONFIG_REGION, pci.PCI_CONFIG_SIZE, 1),
    "the end of config space and one more": (CONFIG_REGION, pci.PCI_CONFIG_SIZE - 1, 2),
    "region 9": (9, 0, 4),
    "region -1": (0xFFFFFFFF, 0, 4),
    "256 bytes behind the end": (CONFIG_REGION, 1, 256),
}


@pytest.mark.parametrize("place", OUTSIDE.values(), ids=OUTSIDE)
def test_access_outside_of_a_region_is_refused(client: VfioUserClient, place: tuple[int, int, int]) -> None:
    region, offset, count = place
    with pytest.raises(Refused) as refused:
        client.read_bytes(region, offset, count)
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(Refused) as refused:
        client.write_bytes(region, offset, bytes(count))
    assert refused.value.errno == errno.EINVAL
    client.write_bytes(region, offset, bytes(count), posted=True)
    assert client.read(CONFIG_REGION, 0) == device.IDENTITY


@pytest.mark.parametrize("count", [0, 3, 5, 16, 4096])
def test_odd_width_of_a_register_is_answered(client: VfioUserClient, count: int) -> None:
    """The specification doesn't say how, but the reply has as many bytes as were asked for."""
    for act in (client.read_bytes, lambda *place: client.write_bytes(place[0], place[1], bytes(place[2]))):
        try:
            act(0, 0, count)
        except Refused as refusal:
            assert refusal.errno == errno.EINVAL
    assert client.read(CONFIG_REGION, 0) == device.IDENTITY


def test_count_of_a_read_is_bounded(client: VfioUserClient) -> None:
    for count in (client.most_data + 1, 0x7FFFFFFF, 0xFFFFFFFF):
        with pytest.raises(Refused) as refused:
            client.call(vfu.REGION_READ, vfu.ACCESS.pack(device.SHARED[0], 2, count))
        assert refused.value.errno in (errno.EINVAL, errno.E2BIG)


@pytest.mark.parametrize("count", [0, 3, 5, 0xFFFFFFFF])
def test_write_with_another_count_than_it_has_bytes_is_refused(client: VfioUserClient, count: int) -> None:
    with pytest.raises(Refused) as refused:
        client.call(vfu.REGION_WRITE, vfu.ACCESS.pack(device.SCRATCH, 0, count) + b"\1\2\3\4")
    assert refused.value.errno == errno.EINVAL
    assert client.read(0, device.SCRATCH) == 0


def test_read_with_data_is_refused(client: VfioUserClient) -> None:
    with pytest.raises(Refused) as refused:
        client.call(vfu.REGION_READ, vfu.ACCESS.pack(device.SCRATCH, 0, 4) + b"\1\2\3\4")
    assert refused.value.errno == errno.EINVAL


def test_posted_writes_are_done_before_what_follows(client: VfioUserClient) -> None:
    before = client.read(0, device.WRITES)
    requests = [
        vfu.frame(
            vfu.REGION_WRITE,
            vfu.ACCESS.pack(device.SCRATCH, 0, 4) + struct.pack("<I", value),
            flags=vfu.NO_REPLY,
        )
        for value in range(1, 101)
    ]
    client.send_frame(b"".join(requests))
    assert client.read(0, device.SCRATCH) == 100
    assert client.read(0, device.WRITES) == before + 100
    assert client.is_silent


# RESET


def test_reset_is_idempotent_and_resets_registers_and_config_space(client: VfioUserClient) -> None:
    resets = client.read(0, device.RESETS)
    client.write(0, device.SCRATCH, 5)
    client.write(CONFIG_REGION, pci.PCI_COMMAND, 0x407, 2)
    client.write(CONFIG_REGION, pci.PCI_INTERRUPT_LINE, 11, 1)
    client.send_frame(vfu.frame(vfu.RESET, message_id=7) + vfu.frame(vfu.RESET, message_id=8))
    client.receive_reply(vfu.RESET, 7)
    client.receive_reply(vfu.RESET, 8)
    assert client.read(0, device.RESETS) == resets + 2
    assert client.read(0, device.SCRATCH) == 0
    assert client.read(CONFIG_REGION, pci.PCI_COMMAND, 2) == 0
    assert client.read(CONFIG_REGION, pci.PCI_INTERRUPT_LINE, 1) == 0


def test_device_state_survives_its_client(server: VfioUserServer) -> None:
    with server.negotiated("probe") as client:
        client.write(0, device.SCRATCH, 0x5AFE)
    with server.connect("probe") as client:
        client.version()
        assert client.read(0, device.SCRATCH) == 0x5AFE


# What a server need not have


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (vfu.GET_REGION_IO_FDS, vfu.QUAD.pack(16, 0, 0, 0)),
        (vfu.DMA_READ, struct.pack("<QQ", 0, 4)),
        (vfu.DMA_WRITE, struct.pack("<QQ", 0, 4) + bytes(4)),
        (0, b""),
        (14, b""),
        (vfu.WRITE_MULTI, struct.pack("<Q", 1) + vfu.SINGLE_WRITE.pack(device.SCRATCH, 0, 4, b"\1" * 8)),
        *((vfu.FEATURE, struct.pack("<II", 8, flags)) for flags in (1 << 18 | 1, 1 << 16 | 2, 1 << 17, 0)),
        (vfu.MIG_DATA_READ, struct.pack("<II", 8, 100)),
        (vfu.MIG_DATA_WRITE, struct.pack("<II", 12, 4) + bytes(4)),
        (19, bytes(64)),
        (0xFFFF, b""),
    ],
)
def test_command_that_is_not_supported_is_answered(
    client: VfioUserClient, command: int, payload: bytes
) -> None:
    with pytest.raises(Refused) as refused:
        client.call(command, payload)
    assert refused.value.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY)
    client.send(command, payload, flags=vfu.NO_REPLY)
    assert client.read(CONFIG_REGION, 0) == device.IDENTITY
    assert client.read(0, device.SCRATCH) == 0


# The stream


@pytest.mark.parametrize("message_id", [0, 1, 0x7FFF, 0xFFFF])
def test_id_and_command_are_those_of_the_request(client: VfioUserClient, message_id: int) -> None:
    for command, payload in ((vfu.GET_INFO, vfu.QUAD.pack(16, 0, 0, 0)), (vfu.RESET, b"")):
        client.send_frame(vfu.frame(command, payload, message_id))
        client.receive_reply(command, message_id)


EVERYTHING = [
    (vfu.GET_INFO, vfu.QUAD.pack(16, 0, 0, 0)),
    (vfu.GET_REGION_INFO, vfu.REGION_INFO.pack(32, 0, 0, 0, 0, 0)),
    (vfu.GET_IRQ_INFO, vfu.QUAD.pack(16, 0, 2, 0)),
    (vfu.SET_IRQS, vfu.IRQ_SET.pack(20, vfu.DATA_NONE | vfu.TRIGGER, vfu.INTX, 0, 0)),
    (vfu.REGION_WRITE, vfu.ACCESS.pack(0, 0, 4) + b"abcd"),
    (vfu.REGION_READ, vfu.ACCESS.pack(0, 0, 4)),
    (vfu.DMA_MAP, vfu.MAP.pack(32, 3, 0, 1 << 30, 4096)),
    (vfu.DMA_UNMAP, vfu.UNMAP.pack(24, 0, 1 << 30, 4096)),
    (vfu.RESET, b""),
]


@pytest.mark.parametrize("size", [1, 7, 16, 17, 1 << 20])
def test_stream_may_be_cut_anywhere(client: VfioUserClient, size: int) -> None:
    stream = b"".join(
        vfu.frame(command, payload, number) for number, (command, payload) in enumerate(EVERYTHING)
    )
    for start in range(0, len(stream), size):
        client.send_frame(stream[start : start + size])
    replies = [client.receive_reply(command, number) for number, (command, _) in enumerate(EVERYTHING)]
    assert replies[5].payload[-4:] == b"abcd"


def test_each_fd_belongs_to_the_message_that_it_came_with(client: VfioUserClient) -> None:
    """Several messages lie in the socket at once, each with an fd at its first byte."""
    with events(5) as made:
        for vector, event in enumerate(made):
            payload = vfu.IRQ_SET.pack(20, vfu.DATA_EVENTFD | vfu.TRIGGER, vfu.MSIX, vector, 1)
            client.send(vfu.SET_IRQS, payload, [event.fd], vfu.NO_REPLY)
        enable_msix(client)
        client.write(0, device.RAISE, 3)
        assert client.is_silent
        assert [event.take() for event in made] == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize(("command", "payload"), [each for each in EVERYTHING if each[0] != vfu.DMA_MAP])
def test_fds_that_nobody_asked_for_are_closed(
    client: VfioUserClient, server: VfioUserServer, command: int, payload: bytes, count: int
) -> None:
    """Whether the message is carried out or refused; the fixture of the server looks at its fds."""
    with events(count) as made:
        for _ in range(20):
            try:
                client.call(command, payload, fds_of(made))
            except Refused as refusal:
                assert refusal.errno in (errno.EINVAL, errno.ENOENT)
    assert client.read(CONFIG_REGION, 0) == device.IDENTITY


def test_fds_that_come_with_the_payload_are_closed(client: VfioUserClient) -> None:
    message = vfu.frame(vfu.REGION_READ, vfu.ACCESS.pack(0, 0, 4), 9)
    with events(2) as made:
        for _ in range(20):
            client.send_frame(message[:16])
            client.send_frame(message[16:20], fds_of(made))
            client.send_frame(message[20:], fds_of(made))
            client.receive_reply(vfu.REGION_READ, 9)


def test_second_client_is_turned_away(server: VfioUserServer, client: VfioUserClient) -> None:
    with server.connect("probe") as second, pytest.raises((EOFError, ConnectionError)):
        second.version()
    assert client.read(CONFIG_REGION, 0) == device.IDENTITY
