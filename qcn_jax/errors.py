"""The one exception that a user should ever see: a single clear line."""


class UserError(Exception):
    """Bad input or a machine that lacks something; `str(error)` is one line.

    The line names the flag, field or file at fault and says what is allowed. The command line prints it
    without a traceback and exits with status 1; every other exception is a defect and keeps its traceback.
    """
