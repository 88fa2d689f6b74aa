"""Report bad input to the users of the command-line tools."""

import errno
import sys
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Numbers of the errors of a full disk, an exhausted quota and a file system that cannot be written."""


class UserError(Exception):
    """Bad input: the message says what was expected, what was found and what to do."""


def run_tool(main: Callable[[], int | None]) -> None:
    """Run a tool's ``main`` and exit with its status (None is 0).

    A :class:`UserError`, a full disk, or an output path that exists already, is a folder, lies below a file, or may not
    be accessed, becomes one line on standard error and exit status 2; Ctrl-C exits with 130. Every other exception is
    a bug, and keeps its traceback.
    """
    try:
        sys.exit(main())
    except (UserError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        sys.exit(_complain(error))
    except OSError as error:
        if error.errno not in FULL:
            raise
        sys.exit(_complain(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(error: Exception) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2
