"""Errors that a person can mend; anything else is ours and keeps its traceback."""


class OmniMRIError(Exception):
    """Something outside the program is not as it must be: a file, a cluster, a registry, a run of another kind.

    A job prints the message in one line and exits with status 1. Wrong values are plain `ValueError`. Sub-classes pass
    every argument to `super().__init__`, so that they survive the way between Ray processes.
    """


class ClusterError(OmniMRIError):
    """Ray cannot be reached or started."""


class TrackingError(OmniMRIError):
    """MLflow does not hold what was asked for."""
