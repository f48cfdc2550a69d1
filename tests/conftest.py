"""Fixtures that test_kvcache.py has for all tests."""

from test_kvcache import smollm2, tiny

__all__ = ["smollm2", "tiny"]
