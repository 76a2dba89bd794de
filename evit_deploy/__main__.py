"""The program ``evit-deploy``, also ``python -m evit_deploy``: it listens to signals before it imports more."""

import sys

from evit_deploy import interrupts


def main() -> None:
    """See :func:`evit_deploy.cli.main`."""
    interrupts.listen()
    try:
        from evit_deploy import cli

        cli.main()
    except KeyboardInterrupt:  # while that was imported, or in the last moment
        interrupts.ignore()
        sys.stderr.write(f"evit-deploy: {interrupts.SENTENCE}\n")
        sys.exit(interrupts.exit_code())
    except (OSError, MemoryError) as error:  # so little is left that not even the command line can be imported
        sys.stderr.write(f"evit-deploy: {error or 'not enough memory'}\n")
        sys.exit(4)


if __name__ == "__main__":
    main()
