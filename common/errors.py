"""The two ways a script ends early, kept apart from everything that raises them; and what others' errors say.

`common.cli.run` turns them into exit codes: `UserError` into 2, `CheckFailed` into 1, each as one line on stderr.
"""


class UserError(Exception):
    """Bad input or a missing requirement. The message is one line: what was wrong, where, what to do."""


class CheckFailed(Exception):
    """A check of the script's own failed: tokens differ, a figure above its ceiling, the wrong kernel."""


def first_line(error: BaseException) -> str:
    """An exception of another's making in one line: the first of its message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def file_and_reason(error: OSError) -> str:
    """What the system says of a file, in one line."""
    return f"{error.filename or 'writing'}: {error.strerror}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device had no memory left. torch is not imported for this: its class is known by name, its CPU
    allocator by its message.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)
