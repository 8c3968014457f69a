"""Entry point of the `tessera` command, which imports little, so that Ctrl-C is handled while the rest is imported."""

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line. Ctrl-C during its imports exits with 130 and one line, as it does later."""
    try:
        from launchers.cli import main as run
    except KeyboardInterrupt:
        print("interrupted: nothing was begun", file=sys.stderr)
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
