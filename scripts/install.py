"""Make the environment for `make demo` and `make test`, using only the standard library.

Does nothing if the environment is complete, and repairs what a killed run left incomplete.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "demo,dev,docs,eval,export,int8"

# PyPI has no package named detectron2. This one is a third-party build of upstream's sources of 2024. It is tagged for
# Python 3.10 but fits every Python 3, because it is pure Python except for one compiled file, which ViSFT does not use.
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
WHEEL_PYTHON = ["--python-version", "3.10", "--only-binary=:all:", "--no-deps"]
UPSTREAM = "git+https://github.com/facebookresearch/detectron2.git"

NEEDED = ("torch", "torchvision", "detectron2", "open_clip", "timm", "pytest")
PROBE = """
import warnings
warnings.simplefilter("ignore")
import cv2, open_clip, pycocotools.mask, pytest, timm, torch, torchvision
import detectron2.engine, detectron2.model_zoo
import visft
print("torch", torch.__version__, "and detectron2", detectron2.__version__)
"""


class InstallError(Exception):
    """The environment cannot be made. The message says why and what to do."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def stop_old_python() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (run by whatever python3 there is)
        found = ".".join(map(str, sys.version_info[:3]))
        raise InstallError(
            f"Python {found} found, 3.10 or later needed: name one with `make PYTHON=python3.11 ...`"
        )


class Environment:
    """A virtual environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.stamp = folder / ".visft-ready.json"

    # -- state

    def wanted(self) -> dict:
        """What a finished environment was made from. If this changes, the environment is made again."""
        digest = hashlib.sha256()
        for source in ("setup.py", "scripts/install.py"):
            digest.update((ROOT / source).read_bytes())
        return {
            "sources": digest.hexdigest(),
            "root": str(ROOT),
            "detectron2": os.environ.get("DETECTRON2", "wheel"),
        }

    def ready(self) -> bool:
        try:
            stamp = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return False
        site = Path(stamp.pop("site", ""))
        here = self.python.exists() and all((site / name / "__init__.py").exists() for name in NEEDED)
        return here and stamp == self.wanted()

    def site(self) -> Path:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(self.output("-c", code))

    def works(self, *arguments: str) -> bool:
        try:
            done = subprocess.run([self.python, *arguments], capture_output=True)
        except OSError:
            return False
        return done.returncode == 0

    def output(self, *arguments: str) -> str:
        return subprocess.run(
            [self.python, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    # -- steps

    def pip(self, *arguments: str) -> None:
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "--retries", "10", *arguments]
        done = subprocess.run([*command[:4], "-q", *command[4:]], cwd=ROOT)
        if done.returncode:
            shown = " ".join(arguments)
            raise InstallError(
                f"`pip {shown}` failed (status {done.returncode}); see its message above. "
                "Run the same make again: finished steps are kept."
            )

    def create(self) -> None:
        say(f"making {self.folder} with Python {sys.version.split()[0]}")
        base = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
        if subprocess.run(base, capture_output=True).returncode == 0:
            return
        # Debian ships Python without ensurepip. The interpreter's own pip then installs pip into the environment.
        bare = subprocess.run([*base, "--without-pip"], capture_output=True, text=True)
        if bare.returncode:
            raise InstallError(f"`{' '.join(base)}` failed: {bare.stderr.strip() or bare.stdout.strip()}")
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "-q", "pip"]
        if subprocess.run(command).returncode:
            raise InstallError(
                "no pip for the environment: install your system's python3-venv or a pip >= 22.3"
            )

    def mend(self) -> None:
        """Remove incomplete packages of a killed pip, so that pip installs them again.

        pip considers a package installed if its METADATA exists, even if other files are missing.
        """
        for path in broken_distributions(self.site()):
            name = path.name.removesuffix(".dist-info")
            say(f"{name} is half installed: installing it again")
            shutil.rmtree(path)
            if name.startswith("pip-") and not self.works("-m", "ensurepip", "--default-pip"):
                self.create()
                return
        for leftover in self.site().glob("~*"):  # pip's name for files that it was about to remove
            shutil.rmtree(leftover, ignore_errors=True)

    def detectron2(self) -> None:
        if self.works("-c", "import importlib.util as u, sys; sys.exit(u.find_spec('detectron2') is None)"):
            if distribution(self.site(), "sal_detectron2") or distribution(self.site(), "detectron2"):
                return
        choice = os.environ.get("DETECTRON2", "wheel")
        if choice == "upstream":
            say("building detectron2 from its own repository (some minutes)")
            self.pip("install", "--no-build-isolation", "--no-deps", UPSTREAM)
            return
        if choice != "wheel":
            raise InstallError(f"DETECTRON2 is `{choice}`; expected `wheel` (the default) or `upstream`")
        say(f"installing detectron2 from PyPI's {WHEEL}, after checking the wheel's SHA-256")
        with tempfile.TemporaryDirectory() as folder:
            self.pip("download", *WHEEL_PYTHON, "--dest", folder, WHEEL)
            (wheel,) = Path(folder).glob("*.whl")
            check_sha256(wheel, WHEEL_SHA256)
            self.pip(
                "install", *WHEEL_PYTHON, "--no-index", "--upgrade", "--target", str(self.site()), str(wheel)
            )
        say(
            "detectron2's metadata asks for numpy < 2, but it works with later versions: if pip prints "
            "`dependency conflicts ... sal-detectron2` later, ignore it"
        )

    def make(self) -> None:
        self.stamp.unlink(missing_ok=True)
        if self.works("-c", "import sys; sys.exit(sys.version_info < (3, 10))"):
            if not self.works("-m", "pip", "--version") and not self.works(
                "-m", "ensurepip", "--default-pip"
            ):
                self.create()
        else:
            self.create()
        self.mend()
        say("installing requirements (several GB for torch the first time; takes minutes)")
        self.pip("install", "-e", f".[{EXTRAS}]")
        self.detectron2()
        try:
            versions = self.output("-c", PROBE)
        except subprocess.CalledProcessError as error:
            raise InstallError(
                f"the environment is incomplete:\n{error.stderr}\nRemove {self.folder} and run make again"
            ) from None
        # Write the stamp last and by renaming, so that it exists only for a finished environment.
        aside = self.stamp.with_suffix(".tmp")
        aside.write_text(json.dumps({**self.wanted(), "site": str(self.site())}))
        os.replace(aside, self.stamp)
        say(f"{self.folder} is ready: {versions}")


def distribution(site: Path, name: str) -> Path | None:
    return next(iter(site.glob(f"{name}-*.dist-info")), None)


def broken_distributions(site: Path) -> list[Path]:
    """Return metadata folders whose RECORD is missing or incomplete, or lists files that are missing or differ."""
    return [info for info in sorted(site.glob("*.dist-info")) if not is_whole(info)]


def is_whole(info: Path) -> bool:
    try:
        with open(info / "RECORD", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3]
    except OSError:
        return False
    # A wheel has a RECORD, to which installers add their own files at the very end.
    if f"{info.name}/INSTALLER" not in {row[0] for row in rows} or not (info / "METADATA").exists():
        return False
    for name, _, size in rows:
        if size and not name.endswith(".pyc"):
            path = os.path.join(info.parent, name)
            if not os.path.exists(path) or os.path.getsize(path) != int(size):
                return False
    return True


def check_sha256(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(
            f"{path.name} has SHA-256 {found}, expected {expected}: it is not the file that was checked, so it is not "
            "installed. Use `DETECTRON2=upstream` to build detectron2 from its own repository instead."
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment")
    folder = parser.parse_args().venv.absolute()
    try:
        stop_old_python()
        # A lock, because `make demo` and `make test` may be started together.
        lock = os.open(ROOT, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = Environment(folder)
        if not environment.ready():
            environment.make()
    except InstallError as error:
        print(f"[setup] {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
