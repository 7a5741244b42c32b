"""Gives a module another class, whose forward is then the one that runs, whatever was hooked around the old one."""

from __future__ import annotations

from functools import cache
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


def put_before(module: Any, before: Any, prefix: str) -> None:
    """Puts a class before a module's own, in place: its forward runs, and `super()` in it is the stock module.

    Args:
        module: of any class.
        before: that comes first.
        prefix: of the name of the class of both.
    """
    stock: Any = type(module)
    become(module, _joined(prefix, before, stock))


@cache
def _joined(prefix: str, before: Any, stock: Any) -> Any:
    return type(f"{prefix}{stock.__name__}", (before, stock), {"__module__": __name__})
