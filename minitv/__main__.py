"""The program `minitv`, also as `python -m minitv`."""

import os
import sys

SIGNALS = (129, 130, 143)  # exit codes of a command that a signal ended

try:
    from . import job
    from .cli import main
except KeyboardInterrupt:  # before the command line listens for signals
    print("\nminitv: stopped", file=sys.stderr)
    os._exit(130)


def run() -> None:
    """Run the command line, as a rank where a launcher has started several, and end the process with its exit code.

    After a signal nobody waits for threads that still compile or compute.
    """
    code = job.run(main, sys.argv[1:])
    if code in SIGNALS and not job.here().settled:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":  # worker processes import this module too
    run()
