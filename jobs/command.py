"""What every job has in common: its parser, its log, and how it fails."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable

from omnimri.platform.errors import OmniMRIError


def job_parser(name: str, manual: str | None) -> argparse.ArgumentParser:
    """Make the parser of a job; its manual is the docstring of its module."""
    return argparse.ArgumentParser(
        prog=f"omnimri {name}", description=manual, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_job(name: str, action: Callable[[], int | None]) -> int:
    """Run a job; what its user can mend becomes one line on stderr, anything else keeps its traceback.

    Args:
        name: Name of the job.
        action: The job itself; returns its exit status, or None for success.

    Returns:
        The exit status: 1 after an error of the user's making, 130 after Ctrl-C.
    """
    set_up_logging()
    try:
        return action() or 0
    except (ValueError, OmniMRIError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print(f"omnimri {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        logging.getLogger(__name__).debug("the error above", exc_info=True)
        return 1
    except KeyboardInterrupt:
        print(f"omnimri {name}: interrupted", file=sys.stderr)
        return 130


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the story of the run to stderr, ours in full and other packages' from warnings upwards."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("omnimri").setLevel(level)
    # Deprecations inside other packages are for our tests, not for people who run a job.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
