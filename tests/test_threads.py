"""Calls that share the process's threads: none waits for another's, and none fails for want of a thread."""

import mmap
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import vmsnap
from support import MIB, pattern, read, run_python_well, write
