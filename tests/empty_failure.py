"""A module whose import fails without a word."""

raise AssertionError
