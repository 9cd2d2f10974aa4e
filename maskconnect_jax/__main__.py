"""The command `maskconnect`, and `python -m maskconnect_jax`."""

from maskconnect_jax import command


def main() -> None:
  """Runs the command line of `maskconnect_jax.main`."""
  command.begin()
  from maskconnect_jax import main as program  # takes seconds: JAX

  program.run()


if __name__ == '__main__':
  main()
