"""The two ways a script ends early, kept apart from everything that raises them.

`common.cli.run` turns them into exit codes: `UserError` into 2, `CheckFailed` into 1, each as one line on stderr.
"""


class UserError(Exception):
    """Bad input or a missing requirement. The message is one line: what was wrong, where, what to do."""


class CheckFailed(Exception):
    """A check of the script's own failed: tokens differ, a figure above its ceiling, the wrong kernel."""
