"""Gives a module another class, whose forward is then the one that runs, whatever was hooked around the old one."""

from __future__ import annotations

from types import MethodType
from typing import Any


def become(module: Any, cls: Any) -> None:
    """Changes a module's class in place; weights and their names stay.

    Args:
        module: maybe on a device of its own: accelerate, which spreads models over devices, holds on to the forward
            that it found.
        cls: a subclass of the module's.
    """
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module._old_forward = MethodType(cls.forward, module)
