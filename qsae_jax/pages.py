"""Memory in pages of two megabytes, where Linux gives them to those that ask.

XLA takes the memory of a step from the C library and gives it back, so that every step touches hundreds of megabytes
anew, four kilobytes at a time: a third of a training's time on two cores. glibc asks for large pages when it is told to
before a program begins, and not later: so the program begins anew.
"""

import os
import platform
import sys
from pathlib import Path

TUNABLES, ASK = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def to_be_asked(setting: Path = SETTING) -> bool:
    """Whether large pages are for those that ask, and nobody has told the C library anything yet."""
    name, version = platform.libc_ver()
    known = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if sys.platform != "linux" or TUNABLES in os.environ or name != "glibc" or known < [2, 35]:
        return False
    try:
        return "[madvise]" in setting.read_text()
    except OSError:
        return False


def with_huge_pages() -> None:
    """Begin this program anew with large pages, where it would not have them. To be called before anything else."""
    if to_be_asked() and sys.executable:
        os.environ[TUNABLES] = ASK
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
