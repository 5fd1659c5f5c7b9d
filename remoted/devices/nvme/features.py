# SPDX-License-Identifier: GPL-2.0-or-later
"""Set Features and Get Features (NVM Express 1.4, 5.21 and 5.13). No feature is saveable."""

from __future__ import annotations

from remoted.device import buffer, register, set_to_reset_values
from remoted.devices.nvme.nvme_h import ALL_NAMESPACES, CommandError, Feature, Status
from remoted.devices.nvme.queues import MAX_IO_QUEUES, Command

__all__ = ["CRITICAL_TEMPERATURE", "TEMPERATURE", "WARNING_TEMPERATURE", "Features"]

TEMPERATURE = 313
"""what the controller reports, in kelvins"""
WARNING_TEMPERATURE = 343
CRITICAL_TEMPERATURE = 353

_CDW10, _CDW11 = 40, 44
"""bytes of the command, for the error log"""
_SAVE = 1 << 31
_CURRENT, _DEFAULT, _SAVED, _CAPABILITIES = range(4)
"""values of the Select field"""
_IS_NAMESPACE_SPECIFIC, _IS_CHANGEABLE = 1 << 1, 1 << 2
_ALL_SENSORS = 0xF

_SIMPLE = {
    Feature.ARBITRATION: ("_arbitration", 0xFFFF_FF07),
    Feature.ERROR_RECOVERY: ("_error_recovery", 0xFFFF),
    Feature.VOLATILE_WRITE_CACHE: ("_write_cache", 0x1),
    Feature.INTERRUPT_COALESCING: ("_coalescing", 0xFFFF),
    Feature.WRITE_ATOMICITY: ("_write_atomicity", 0x1),
    Feature.ASYNC_EVENT_CONFIGURATION: ("_event_configuration", 0xFF),
}
"""attribute and writable bits"""


class Features:
    """The values that the host has set, until the next reset."""

    _arbitration: int = register(32, 0x07)
    _error_recovery: int = register(16)
    _write_cache: int = register(1, 1)
    _coalescing: int = register(16)
    _write_atomicity: int = register(1)
    _event_configuration: int = register(8)
    _over_temperature: int = register(16, WARNING_TEMPERATURE)
    _under_temperature: int = register(16)
    _not_coalesced: bytearray = buffer((MAX_IO_QUEUES + 8) // 8, bytes((MAX_IO_QUEUES + 8) // 8))
    """a bit for each interrupt vector"""

    def __init__(self, queues: int) -> None:
        """``queues`` is the number of I/O queues of each kind."""
        self.queues = queues
        set_to_reset_values(self)

    def clear(self) -> None:
        """Gives each feature its default value."""
        set_to_reset_values(self)

    @property
    def has_write_cache(self) -> bool:
        """Whether writes may be volatile until a Flush."""
        return bool(self._write_cache)

    @property
    def is_too_warm_or_cold(self) -> bool:
        """Whether the temperature is at or beyond a threshold."""
        return not self._under_temperature < TEMPERATURE < self._over_temperature

    @property
    def reports_temperature(self) -> bool:
        """Whether the host wants an event when the temperature crosses a threshold."""
        return bool(self._event_configuration & 0x02)

    def get(self, command: Command) -> int:
        """Dword 0 of the completion. Raises CommandError."""
        feature = _feature(command)
        select = command.cdw10 >> 8 & 0x7
        if select > _CAPABILITIES:
            raise CommandError(Status.INVALID_FIELD, _CDW10 + 1)
        if feature is Feature.ERROR_RECOVERY:
            _check_namespace(command, needs_one=True)
        if select == _CAPABILITIES:
            specific = _IS_NAMESPACE_SPECIFIC if feature is Feature.ERROR_RECOVERY else 0
            return specific | _IS_CHANGEABLE
        source = self if select == _CURRENT else Features(self.queues)
        return source._value(feature, command.cdw11)

    def _value(self, feature: Feature, cdw11: int) -> int:
        if feature in _SIMPLE:
            return int(getattr(self, _SIMPLE[feature][0]))
        if feature is Feature.NUMBER_OF_QUEUES:
            return (self.queues - 1) << 16 | (self.queues - 1)
        if feature is Feature.TEMPERATURE_THRESHOLD:
            return getattr(self, _threshold(cdw11, is_set=False))  # type: ignore[no-any-return]
        if feature is Feature.INTERRUPT_VECTOR_CONFIGURATION:
            vector = self._vector(cdw11)
            return vector | (self._not_coalesced[vector // 8] >> vector % 8 & 1) << 16
        return 0  # power state 0 is the only one

    def set(self, command: Command, *, has_io_queues: bool) -> int:
        """Dword 0 of the completion. Raises CommandError."""
        feature, value = _feature(command), command.cdw11
        if command.cdw10 & _SAVE:
            raise CommandError(Status.FEATURE_NOT_SAVEABLE, _CDW10 + 3)
        _check_namespace(command, needs_one=feature is Feature.ERROR_RECOVERY)
        if feature in _SIMPLE:
            attribute, writable = _SIMPLE[feature]
            # Bit 16 is DULBE, which the namespace doesn't have.
            if feature is Feature.ERROR_RECOVERY and value & 1 << 16:
                raise CommandError(Status.INVALID_FIELD, _CDW11 + 2)
            setattr(self, attribute, value & writable)
        elif feature is Feature.NUMBER_OF_QUEUES:
            if has_io_queues:
                raise CommandError(Status.COMMAND_SEQUENCE_ERROR)
            if value & 0xFFFF == 0xFFFF or value >> 16 == 0xFFFF:
                raise CommandError(Status.INVALID_FIELD, _CDW11)
            return self._value(feature, value)
        elif feature is Feature.TEMPERATURE_THRESHOLD:
            setattr(self, _threshold(value, is_set=True), value & 0xFFFF)
        elif feature is Feature.INTERRUPT_VECTOR_CONFIGURATION:
            vector = self._vector(value)
            rest = self._not_coalesced[vector // 8] & ~(1 << vector % 8)
            self._not_coalesced[vector // 8] = rest | (value >> 16 & 1) << vector % 8
        elif value & 0x1F:  # a power state other than 0
            raise CommandError(Status.INVALID_FIELD, _CDW11)
        return 0

    def _vector(self, cdw11: int) -> int:
        vector = cdw11 & 0xFFFF
        if vector > self.queues:
            raise CommandError(Status.INVALID_FIELD, _CDW11)
        return vector


def _feature(command: Command) -> Feature:
    try:
        return Feature(command.cdw10 & 0xFF)
    except ValueError:
        raise CommandError(Status.INVALID_FIELD, _CDW10) from None


def _check_namespace(command: Command, *, needs_one: bool) -> None:
    if command.nsid == ALL_NAMESPACES or (command.nsid == 0 and not needs_one):
        return
    if command.nsid != 1:
        raise CommandError(Status.INVALID_NAMESPACE, 4)
    if not needs_one:
        raise CommandError(Status.FEATURE_NOT_NAMESPACE_SPECIFIC, 4)


def _threshold(cdw11: int, *, is_set: bool) -> str:
    """The attribute of a temperature threshold; only the composite temperature has any."""
    sensor, kind = cdw11 >> 16 & 0xF, cdw11 >> 20 & 0x3
    if kind > 1 or (sensor and not (is_set and sensor == _ALL_SENSORS)):
        raise CommandError(Status.INVALID_FIELD, _CDW11 + 2)
    return "_under_temperature" if kind else "_over_temperature"
