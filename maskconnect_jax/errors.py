"""The error for bad input: modules raise it, `main` prints it."""

from __future__ import annotations


class InputError(ValueError):
  """The user's input cannot be used.

  The message is one line that names the wrong input and says how to correct it.
  The command line prints the message and exits with status 2, without a
  traceback.
  """
