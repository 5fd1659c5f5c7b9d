# SPDX-License-Identifier: GPL-2.0-or-later
"""A service's reply as it goes over its socket."""

from __future__ import annotations

from typing import Any

from asyncvarlink import AnnotatedResult, VarlinkInterface, varlinksignature

__all__ = ["status_of"]


def status_of(service: VarlinkInterface) -> dict[str, Any]:
    """What its method Status replies."""
    method = getattr(service, "Status")  # noqa: B009 - only some interfaces have it
    signature = varlinksignature(method)
    assert signature is not None
    result = method()
    assert isinstance(result, AnnotatedResult)
    return dict(signature.return_type.tojson(result.parameters))
