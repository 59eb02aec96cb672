"""How the installed vmsnap was built."""

from dataclasses import dataclass

from vmsnap import _vmsnap

__all__ = ["BuildInfo", "build_info"]


@dataclass(frozen=True)
class BuildInfo:
    """How the installed vmsnap was built.

    Attributes
    ----------
    version
        The version of vmsnap.
    features
        The Cargo features that the core was built with: ``age``, ``aws-lc``, ``c-lz4``.
    commit
        The Git commit it was built from; None if the build did not know it.
    """

    version: str
    features: tuple[str, ...]
    commit: str | None


def build_info() -> BuildInfo:
    """Return how the installed vmsnap was built.

    >>> import vmsnap
    >>> vmsnap.build_info().version == vmsnap.__version__
    True
    """
    return BuildInfo(_vmsnap.__version__, tuple(_vmsnap.FEATURES), _vmsnap.COMMIT)
