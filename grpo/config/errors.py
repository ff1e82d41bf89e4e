"""Errors that commands report in one line, with exit code 2."""


class ConfigError(Exception):
    """Invalid input. The message states the problem and the fix; commands print it and exit with code 2."""


class FileError(ConfigError, ValueError):
    """A file of a run folder is damaged or has unexpected content. The message names the file."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
