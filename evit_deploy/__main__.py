"""The program ``evit-deploy``, also ``python -m evit_deploy``: signal handlers are installed before the other
imports."""

import sys

from evit_deploy import interrupts


def main() -> None:
    """See :func:`evit_deploy.cli.main`."""
    interrupts.listen()
    try:
        from evit_deploy import cli

        cli.main()
    except KeyboardInterrupt:  # during the import, or after the command line's own handler
        interrupts.ignore()
        sys.stderr.write(f"evit-deploy: {interrupts.SENTENCE}\n")
        sys.exit(interrupts.exit_code())
    except (OSError, MemoryError) as error:  # too little memory or disk even for importing the command line
        sys.stderr.write(f"evit-deploy: {error or 'not enough memory'}\n")
        sys.exit(4)


if __name__ == "__main__":
    main()
