"""Fixtures of the tests of checkpoints serve here too."""

from tests.checkpoint.conftest import _made_checkpoints, tiny_checkpoint

__all__ = ["_made_checkpoints", "tiny_checkpoint"]
