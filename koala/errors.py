"""The one exception that means: the user can put this right.

The command line prints its message as one line and leaves with exit status 2.
"""


class UserError(ValueError):
    """A user's mistake. The message names the value, what is allowed and what to do."""


class Failure(RuntimeError):
    """Something went wrong that no setting would have prevented. Exit status 1, one line."""


class FailedElsewhere(Failure):
    """Another process of the same run failed, and it says why. Exit status 1, no line."""
