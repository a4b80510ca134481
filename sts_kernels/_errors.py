"""Errors that end a command."""


class UserError(Exception):
    """What was asked for cannot be done; the command line prints the message as one line and exits with status 2."""
