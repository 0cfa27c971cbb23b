"""Backends of one kernel: each says which requests it supports, with a reason; one is chosen at the start of a run."""

from collections.abc import Callable
from typing import NamedTuple

from jaxlm.errors import UserError
from jaxlm.registry import Registry


class Backend(NamedTuple):
    supports: Callable  # request -> "" if it can serve, else the reason why not
    run: Callable


def only_on_cpu(request) -> str:
    return "" if request.platform == "cpu" else f"is for CPUs, this is {request.platform}"


def choose(backends: Registry, asked: str, request, preferred: tuple[str, ...]) -> tuple[str, str]:
    """-> (name, why): the one asked for, or for "auto" the first of `preferred` that can serve. Raises UserError where the one
    asked for cannot, or none: never a silent fallback."""
    if asked != "auto":
        reason = backends[asked].supports(request)
        if reason:
            raise UserError(f"{backends.key}={asked!r}: {reason}; use {backends.key}=auto")
        return asked, "asked for"
    refused = []
    for name in preferred:
        reason = backends[name].supports(request)
        if not reason:
            return name, "; ".join(refused) or "fastest that serves"
        refused.append(f"{name}: {reason}")
    raise UserError(f"{backends.key}=auto: no backend serves this run: {'; '.join(refused)}")
