"""Runs need data: the same as in tests/pretrain."""

from tests.pretrain.conftest import build_scenes, material

__all__ = ["build_scenes", "material"]
