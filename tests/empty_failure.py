"""A module whose import raises an exception without a message."""

raise AssertionError
