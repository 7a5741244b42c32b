"""Imported before all else: where torch or transformers are too old for this package, `generate` stays their own.

transformers 4 loads the code of a local folder without being asked to, and takes an OSError to mean that there is none:
so the folder is a plain autoregressive model to it. Newer ones come here only by `trust_remote_code=True`.
"""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version

OLDEST = {"torch": (2, 11), "transformers": (5, 17)}
"""the versions that this package needs at least"""


def too_old(found: dict[str, str]) -> list[str]:
    """What is too old among these versions, and what it should be, in words.

    >>> too_old({"torch": "2.13.0+cpu", "transformers": "4.57.6"})
    ['transformers 4.57.6 (5.17 is needed)']
    """
    numbers = {name: tuple(map(int, re.findall(r"\d+", text)[:2])) for name, text in found.items()}
    return [
        f"{name} {found[name]} ({'.'.join(map(str, oldest))} is needed)"
        for name, oldest in OLDEST.items()
        if numbers[name] < oldest
    ]


if problems := too_old({name: version(name) for name in OLDEST}):
    text = f"no TiDAR decoding with {' and '.join(problems)}: this is plain autoregressive decoding"
    warnings.warn(text, stacklevel=2)
    raise OSError(text)
