"""The errors that commands answer with a line and exit code 2."""


class ConfigError(Exception):
    """Invalid input. The message states the problem and the fix; commands print it and exit with code 2."""


class FileError(ConfigError, ValueError):
    """A file of a run folder that is damaged, or is not what its name says; the message names it."""


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line of our own; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
