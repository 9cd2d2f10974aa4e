"""What is raised for bad input: modules raise it, main prints it."""

from __future__ import annotations


class InputError(ValueError):
  """What the user gave cannot be used.

  The message is one line that names the thing and what would be right; the
  command line prints it and exits with status 2, without a traceback.
  """
