"""What can go wrong for a user: each kind of error carries its exit code."""


class PipelineError(Exception):
    """A failure that its message explains: what, where, and how to mend it."""

    exit_code = 1


class LostError(PipelineError):
    """Another process of the same job ended, so that this one cannot go on."""


class CheckFailedError(PipelineError):
    """A gate closed: not validated, parity, accuracy, graph policy, lint, a wrong answer."""

    exit_code = 3


class CorruptError(PipelineError):
    """Bytes that do not match their digest, or that cannot be read as what they should be."""

    exit_code = 4


class ServerError(PipelineError):
    """No server, it died, or it gave no answer in time."""

    exit_code = 5


class SlowError(ServerError):
    """No answer in time, from a server that may only have too much to do."""


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise PipelineError unless the setting `name` is one of its choices."""
    if value not in choices:
        raise PipelineError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
