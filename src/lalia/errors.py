"""Errors a user can act on."""


class UserError(ValueError):
    """A problem in what the user gave us: data, recipe, files, requests.

    The message names the value received, the limit or expectation, and the remedy. The command line prints it
    without a traceback and exits with status 1; the server turns it into a 4xx response. Anything else that
    escapes is a defect of ours and keeps its traceback.
    """


class CorruptFile(UserError):
    """A file that Lalia wrote (shard, checkpoint, model folder) no longer reads as it was written."""
