"""Errors for the user, each kind with its exit code."""


class PipelineError(Exception):
    """A failure that its message explains: what is wrong, where, and how to fix it."""

    exit_code = 1


class SettingError(PipelineError):
    """A value that a setting does not allow."""

    exit_code = 2


class LostError(PipelineError):
    """A failure because another process of the same job ended: this one cannot continue."""


class CheckFailedError(PipelineError):
    """A failed check: validation, parity, accuracy, graph policy, lint, or a wrong answer."""

    exit_code = 3


class CorruptError(PipelineError):
    """Bytes that do not match their digest, or cannot be read in the expected format."""

    exit_code = 4


class ServerError(PipelineError):
    """A server that is not there, has died, or did not answer in time."""

    exit_code = 5


class SlowError(ServerError):
    """A timeout of a server that may only have too much to do."""


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise SettingError unless the setting `name` is one of its choices."""
    if value not in choices:
        raise SettingError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
