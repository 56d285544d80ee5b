"""The command asks for large pages once, and only where they are for those that ask."""

import os
import subprocess
import sys

import pytest

from qsae_jax import pages

SAY = "import sys; sys.argv = ['x', 'a b']; from qsae_jax.pages import with_huge_pages as w; w(); import os; "
SAY += "print(os.environ.get('GLIBC_TUNABLES'), sys.orig_argv[-1], os.getpid())"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """`asked(setting)`: whether it would begin anew under this setting of the kernel's."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(pages.platform, "libc_ver", lambda: ("glibc", "2.36"))

    def say(setting, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "enabled").write_text(setting)
        return pages.to_be_asked(tmp_path / "enabled")

    return say


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_asks_where_that_helps_and_nobody_has_chosen(asked, monkeypatch, tmp_path):
    assert asked("always [madvise] never")
    assert not asked("[always] madvise never") and not asked("always madvise [never]")
    assert not pages.to_be_asked(tmp_path / "none")
    for version in (("glibc", "2.34"), ("musl", "1.2"), ("", "")):
        monkeypatch.setattr(pages.platform, "libc_ver", lambda version=version: version)
        assert not asked("always [madvise] never")
    monkeypatch.setattr(pages.platform, "libc_ver", lambda: ("glibc", "2.35"))
    assert not asked("always [madvise] never", GLIBC_TUNABLES="glibc.malloc.check=0")


def test_begins_anew_once_with_the_same_words():
    """The same process and arguments. Control: a choice of the user's stays."""
    without = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    argv = [sys.executable, "-c", SAY, "a b"]
    with subprocess.Popen(argv, env=without, stdout=subprocess.PIPE, text=True) as going:
        told = going.communicate()[0].split(" ", 1)
    wanted = pages.ASK if pages.to_be_asked() or os.environ.get("GLIBC_TUNABLES") == pages.ASK else "None"
    assert told == [wanted, f"a b {going.pid}\n"]
    chosen = without | {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
    assert subprocess.run(argv, env=chosen, capture_output=True, text=True).stdout.startswith("glibc.malloc.check=0 ")
