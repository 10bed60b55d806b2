"""How every script ends: its exit code, one line for what went wrong, rows kept after Ctrl-C, a reader that left.

Scripts reach this through `common.cli`; no torch is imported.
"""

import argparse
import contextlib
import errno
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from common.errors import CheckFailed, UserError, file_and_reason, is_out_of_memory

EXIT_CHECK_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141

# What the operating system refuses because of where the user pointed us, not because of a bug here.
_ENVIRONMENT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

made_folders: list[Path] = []  # for output, the deepest first: those still empty at the end are removed


@contextlib.contextmanager
def keep_partial(args: argparse.Namespace) -> Iterator[None]:
    """Around the measuring loop: Ctrl-C ends the loop; the script goes on to draw its rows, and `run` exits 130."""
    try:
        yield
    except KeyboardInterrupt:
        args.interrupted = True
        print("\ninterrupted: keeping the rows measured so far", file=sys.stderr)


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv=None) -> NoReturn:
    """Parse, call `main(args)`, exit: 0; 1 a check failed, or a bug; 2 the user's input or machine; 130 after Ctrl-C.

    An error is one line on stderr; `--debug` adds its traceback. A closed pipe (`script.py | head`) ends quietly.
    """
    try:
        args = parser.parse_args(argv)
        code = _call(main, args, parser.prog)
        sys.stdout.flush()
    except SystemExit as error:  # argparse: --help or an error that it has printed
        code = error.code
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    if code == EXIT_BROKEN_PIPE or _reader_is_gone():
        # The interpreter flushes stdout once more on its way out and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code)


def _call(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, prog: str) -> int:
    try:
        main(args)
        code, message = 0, ""
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, "interrupted"
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return EXIT_BROKEN_PIPE
        code, message = _explain(error)
        if args.debug:
            traceback.print_exc()
    for folder in made_folders:
        with contextlib.suppress(OSError):  # it holds files, or another process removed it
            folder.rmdir()
    if message:
        print(f"{prog}: {one_line(message)}", file=sys.stderr)
    return EXIT_INTERRUPTED if getattr(args, "interrupted", False) else code


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and line for an exception that ended `main`."""
    if isinstance(error, UserError):
        return EXIT_USER_ERROR, f"error: {error}"
    if isinstance(error, CheckFailed):
        return EXIT_CHECK_FAILED, f"check failed: {error}"
    if is_out_of_memory(error):
        first = str(error).strip().split("\n")[0]
        return (
            EXIT_USER_ERROR,
            f"error: out of memory{': ' if first else ''}{first}; try smaller sizes or --preset quick",
        )
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRNOS:
        return EXIT_USER_ERROR, f"error: {file_and_reason(error)}"
    text = str(error).strip().split("\n")[0]
    return EXIT_CHECK_FAILED, f"internal error: {type(error).__name__}: {text}; --debug shows the traceback"


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or stdout is not a file
        return False


def one_line(message: str) -> str:
    return " ".join(message.split())
