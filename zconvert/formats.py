"""Files that zconvert reads back carry a `format_version`: an older one is brought up to date, a newer one is refused.

The versions are here; that of the `tidar` section of config.json is beside its settings, which exports carry along.
Whoever changes a layout adds one to its version, and gives its reader the step that makes the new one of the old.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zconvert import __version__
from zconvert.errors import UserError

PROVENANCE = 1
"""`provenance.json` of a checkpoint"""
EVALUATION = 1
"""`settings.json` and `results.json` of an evaluation; samples go with the first"""
TOKENISED = 1
"""`documents.json` of tokenised documents"""
TRAIN_STATE = 1
"""`state.pt` of a train state; 0 did not tell `tokens_seen`"""

Step = Callable[[dict[str, Any]], dict[str, Any]]


def up_to_date(document: dict[str, Any], what: object, newest: int, steps: Sequence[Step] = ()) -> dict[str, Any]:
    """The document in the layout of today.

    Args:
        document: as it was read; one without a `format_version` is of the oldest version that is read.
        what: names it to the user.
        newest: the version that is written today.
        steps: each makes a version of the one before, the last of them the newest.

    Raises:
        UserError: the document is of a newer version, or of none.

    >>> up_to_date({"count": 3}, "the file", 1, [lambda old: {"counts": [old["count"]]}])
    {'counts': [3], 'format_version': 1}
    """
    oldest = newest - len(steps)
    version = document.get("format_version", oldest)
    reads = f"format_version {newest}" if newest == oldest else f"format_version {oldest} to {newest}"
    if type(version) is not int or version < oldest:
        raise UserError(
            f"{what} has a format_version that never was",
            found=f"format_version {version!r}",
            expected=f"{reads}, which zconvert {__version__} reads",
            fix="the file is damaged: copy or download it again, or make it anew",
        )
    if version > newest:
        raise UserError(
            f"{what} was written by a newer zconvert",
            found=f"format_version {version}",
            expected=f"{reads}, which zconvert {__version__} reads",
            fix="pip install --upgrade zconvert",
        )
    for step in steps[version - oldest :]:
        document = step(document)
    return {**document, "format_version": newest}
