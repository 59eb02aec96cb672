"""Memory of live processes: `ProcessMemory` is a source for guest memory; the other classes read and stop a process."""

from vmsnap._vmsnap import ProcessMemory, ProcessRange, StoppedProcess

__all__ = ["ProcessMemory", "ProcessRange", "StoppedProcess"]
