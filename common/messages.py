# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of events that the daemons log, by the MESSAGE_ID that each has in the journal.

systemd/iohub.catalog has an entry for each, which `journalctl -x` and `iohubctl log --explain` print: what has
happened, what it means for the guest, what to do. An ID stays with its kind for good (systemd.journal-fields(7)).
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Event"]


class Event(StrEnum):
    """A kind of event that an operator may have to act on; the value is its MESSAGE_ID."""

    # A device's clients, in remoted.
    CLIENT_CONNECTED = "e40d20b2861a409db4caf6ae3bfcb985"
    """a client connected to a device's socket"""
    CLIENT_GONE = "ca44d14a0f1c460b84ee9bc3f189f8f4"
    """a client of a device has closed its link"""
    CLIENT_BUSY = "59aa41ca076246a0b75fb1848b65da10"
    """a second client was refused"""
    CLIENT_UNTRUSTED = "bce64e2191bf4330977c6bc7849c910c"
    """a client of a user who isn't trusted was refused"""
    CLIENT_BROKE_PROTOCOL = "b902f2dc1e144f659fbceeb10b9e57a7"
    """a client's message broke the mpqemu protocol"""
    IRQFD_REFUSED = "d858aade321a40a2a9de03073ee8ea20"
    """a SET_IRQFD was refused"""
    RAM_REFUSED = "88bdd7f7f8ed4ce0ad1aeb7716724818"
    """a SYNC_SYSMEM was refused"""
    SHORTAGE = "304fc698443f4e51986eedb4f46c9863"
    """a client could not be served for want of file descriptors or memory"""
    CONTROL_BROKE_PROTOCOL = "f8ac2b3e8d7e49d8803763e294ce502b"
    """a client of a control socket broke the Varlink protocol"""

    # A device's code, in remoted.
    DEVICE_RESET = "a798d607fa9e49188c7547138d3c1315"
    """a device was reset by its client"""
    DEVICE_FAILED = "20d14f620a7a46d8846d3148806f0147"
    """a device's code raised an exception"""
    DEVICE_HANGS = "72e2c5cd26b34134afad17556dfc141f"
    """a device's code does not return"""
    DEVICE_RETURNED = "c0f00988653f4f97b331f3e39289e8c0"
    """a device's code has returned after a hang"""
    DEVICE_SPINS = "a0d40e3492304a1b83570f281bd3af2b"
    """a device's handler ignores what its file descriptor reports"""
    STRAY_ERROR = "68c8305e9d5a4684b9aa9c912f52c3ea"
    """an exception was raised where no caller can handle it"""
    DMA_REFUSED = "d54c3a65ee7d451aa0aea2db55cb4af0"
    """a device's DMA went where it must not"""

    # Start and restart of a daemon.
    START_FAILED = "441f208cdd6f4e87af59b25e695b1032"
    """a daemon could not start, or had to end"""
    MODEL_NOT_LOADED = "709ec362d7764058b2f5355814c6a0b7"
    """a device's model can't be loaded"""
    MODEL_HIDDEN = "ce03da8be4714964a865e7f9ccadd4c8"
    """a model has the name of a built-in one"""
    FUNCTION_UNSEEN = "d7c3796bee9f462586a28e6e684ff5cb"
    """a function has no function 0 in its slot"""
    TAKEN_UP = "e7e1b56ea19a499ba7c882228246f771"
    """a new process goes on with the link of the one before"""
    RESUME_FAILED = "04d7d1f4bad94cb5aaee3740ef580f4c"
    """something of the process before can't be used again"""
    STATE_REFUSED = "80f0c01f0bb94691bdcba6b8296fdf27"
    """the state of the process before doesn't fit"""
    STATE_NOT_KEPT = "1e44039efb59474abdc45b883d7c6716"
    """a device's state doesn't outlive the process"""
    KILLED_WHILE_BUSY = "82e72a7328fd49b0b573f9f39798f57d"
    """a daemon was ended by a second signal"""

    # Chardevs and the journal.
    CHARDEV_DROPS = "84c21a84287c47c5b63dd73c28da25b6"
    """a chardev dropped bytes"""
    CHARDEV_LIMITED = "14e3ed797fae4027a9949f79a18ed973"
    """a chardev works with a restriction"""
    CHARDEV_AT = "27705c1ef5784a278e3bbaa412f15e04"
    """a chardev's pseudo-terminal has a name"""
    JOURNAL_LOST = "b2cfa78ad47248e99c9af36a464f6dbf"
    """lines are missing in the journal"""

    # Links of proxyd.
    LINK_UP = "f33c8299d7694cd1953ab647bc968e2a"
    """proxyd is linked to a device"""
    LINK_ABSENT = "c63965f3e1cc4257a4a1cf237b655751"
    """proxyd can't connect to a device"""
    LINK_LOST = "c5f783d8771e481ab23b874d60e3d41b"
    """proxyd's link to a device has ended"""
    REMOTE_TOO_SLOW = "065c5205618a4d6886889b5c517060d6"
    """a device's answers took too long"""
    LINK_UNWATCHED = "a828fae94485412e9d80438cff920ab4"
    """the end of a link can't be noticed"""

    # VMs.
    QEMU_ATTACHED = "86d072415ae44445891e62846c39714f"
    """proxyd is attached to QEMU"""
    QEMU_DETACHED = "78c93d54a171499fa2ea9b8c522ed817"
    """proxyd has left QEMU, or QEMU has ended"""
    QEMU_LOST = "47607a09091942d095de8d7b71ba77b7"
    """the connection to QEMU's monitor broke"""
    QEMU_AWAITED = "ed0cf8cb01c24b90ab8cec7508d6ad4f"
    """no QEMU can be found"""
    QEMU_STOPPED = "02924dc797554c20930dc7ffb8a29e02"
    """QEMU is stopped by a signal"""
    MONITOR_TAKEN = "e6b9cf3dc7dc46a598ea50e19eb93572"
    """QEMU's monitor has another client, or is busy"""
    GUEST_PAUSED = "2b865b94948f41598796fd5245809446"
    """the guest's vCPUs were stopped"""
    GUEST_RESUMED = "fe56df07dc3c46e782fac3ef78d9473d"
    """the guest's vCPUs run again"""
    MACHINE_RESET = "8b2b26bb964f4656851b2a44489fc478"
    """the machine was reset"""
    MACHINE_SHUT_DOWN = "f2a1acc41ad8445283adeb8fd297b57d"
    """the machine was shut down"""
    GUEST_STOPPED = "365b8e7007f64a8390e7a4b5a0ed66cd"
    """the embedded guest can't go on"""

    # Plugging.
    PLUGGED = "e4c46239cea840aca144cc7f7dbe18a1"
    """a function was plugged into QEMU"""
    ADOPTED = "98ab4bc522384b79bef3ca182671c8da"
    """a function was found plugged"""
    NOT_PLUGGED = "9bd9cf6eef714027910c2c3ac7194054"
    """a function can't be plugged"""
    PLUGGED_WITHOUT_LINK = "affbc4c6734d4fc583e604d4ae36f5bd"
    """a plugged function has no link"""
    UNPLUGGED = "483c7a6babe4493f9b256f1abfa254a0"
    """a function was unplugged on request of proxyd"""
    UNPLUGGED_BY_OTHERS = "86b77f40322343c58c961a7b07e9540c"
    """somebody else unplugged a function"""
    NOT_EJECTED = "8506a518216f42a89e56e49e9bf5ac2e"
    """the guest doesn't eject a function"""
    EJECT_REQUEST_REFUSED = "80171057ccc34c8da554332080cc5506"
    """QEMU refuses a request to unplug"""
    PROXY_DEFECT = "a215372bbb7c42bfbf2af31cf1140c84"
    """QEMU's proxy can't do all that the device needs"""
    LEAVE_TIMEOUT = "1ffb5f076b15467989329247f0907dfa"
    """proxyd had to end before QEMU was done"""

    # With --vm pid:.
    VM_ATTACHED = "a4b205dfa4f2493cadc05c4cc602e123"
    """a device's line was wired into a process's VM"""
    VM_DETACHED = "f251e38b615f4a3da62b55ebd895e05d"
    """a device's line was taken out of a process's VM"""
    VM_STOOD_LONG = "cdb6a64a66a0488ea0b104d11c0760a9"
    """attaching stopped the process for long"""
    DETACH_FAILED = "9e796b46fd41480dbef47f135c44f770"
    """a device's line couldn't be taken out in order"""
    VM_EXITED = "1cd38ffbb36e48b3ac0af1b3dcf2ea1e"
    """the process of the VM has ended"""
