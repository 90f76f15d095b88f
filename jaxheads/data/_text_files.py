"""Text files from disk as bytes that are known to be UTF-8."""

import contextlib
import os
import pathlib
import stat
import sysconfig
from collections.abc import Callable, Iterator

from jaxheads.errors import UserError

# Kinds of file that are not text whatever bytes they hold. Only a shortcut:
# it saves reading large archives, and anything else is judged by its bytes.
_BINARY_SUFFIXES = frozenset(
  ".7z .a .bin .bmp .bz2 .ckpt .class .dll .doc .docx .dylib .exe .flac .gif "
  ".gz .h5 .ico .jar .jpeg .jpg .mkv .mov .mp3 .mp4 .npy .npz .o .ogg .onnx "
  ".parquet .pdf .pickle .pkl .png .ppt .pptx .pt .pth .pyc .pyd .pyo "
  ".safetensors .so .sqlite .tar .tgz .tif .tiff .ttf .wav .webp .whl .woff "
  ".woff2 .xls .xlsx .xz .zip .zst".split()
)
_STDLIB_SKIPPED_FOLDERS = frozenset(
  ("__pycache__", "site-packages", "dist-packages")
)


class NotTextError(Exception):
  """The bytes are not UTF-8 text; the message says why, and where."""


def check_text(raw: bytes) -> None:
  """Raises `NotTextError` unless `raw` is UTF-8 without NUL bytes."""
  nul = raw.find(b"\0")
  if nul >= 0:
    raise NotTextError(f"a NUL byte at offset {nul}")
  try:
    raw.decode("utf-8")
  except UnicodeDecodeError as error:
    raise NotTextError(
      f"byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8"
    ) from None


def is_folder(path: pathlib.Path) -> bool:
  """True for a folder, False for a file or pipe that the user named.

  Raises:
    UserError: There is nothing, it may not be looked at, or it is a device.
  """
  try:
    with _user_errors(path):
      mode = os.stat(path).st_mode
  except ValueError:  # A NUL in the name.
    mode = 0
  if stat.S_ISDIR(mode):
    return True
  # A pipe is welcome (`--data <(zcat ...)`); /dev/zero would never end.
  if stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
    return False
  raise UserError(
    f"`data` must be a file or folder of UTF-8 text, but {str(path)!r} is "
    "neither."
  )


def read_file(path: pathlib.Path) -> bytes:
  """Bytes of one text file that the user named.

  Raises:
    UserError: It cannot be read, is empty, or is not UTF-8 text.
  """
  with _user_errors(path):
    raw = path.read_bytes()
  if not raw.strip():
    raise UserError(
      f"`data` file {str(path)!r} is empty or blank; give a file with text."
    )
  try:
    check_text(raw)
  except NotTextError as error:
    raise UserError(
      f"`data` file {str(path)!r} is not UTF-8 text: {error}; convert it "
      "(for example with iconv) or choose another file."
    ) from None
  return raw


def read_folder(
  folder: pathlib.Path,
) -> tuple[list[tuple[str, bytes]], tuple[str, ...]]:
  """All text files below a folder that the user named.

  Hidden files and folders are passed over and links to folders not followed.

  Args:
    folder: An existing folder.

  Returns:
    (relative path with forward slashes, bytes) sorted by path, and the sorted
    relative paths of the files that were skipped because they are no text.

  Raises:
    UserError: A file cannot be read, or no text file is there.
  """
  documents: list[tuple[str, bytes]] = []
  skipped: list[str] = []
  num_empty = 0
  with _user_errors(folder):
    names = sorted(_walk(folder, lambda name: name.startswith(".")))
  for name in names:
    path = folder / name
    if path.suffix.lower() in _BINARY_SUFFIXES:
      skipped.append(name)
      continue
    with _user_errors(path):
      raw = path.read_bytes()
    if not raw.strip():
      num_empty += 1
      continue
    try:
      check_text(raw)
    except NotTextError:
      skipped.append(name)
      continue
    documents.append((name, raw))
  if not documents:
    raise UserError(
      f"`data` folder {str(folder)!r} has no UTF-8 text file "
      f"({len(skipped)} binary, {num_empty} empty); give a folder that has."
    )
  return documents, tuple(skipped)


def read_standard_library(
  folder: pathlib.Path | None = None,
) -> list[tuple[str, bytes]]:
  """The source of Python's own standard library, as on this machine.

  Installed packages and caches are left out, as are files in other encodings
  (the library's own tests have some) and `_sysconfigdata*`, which holds the
  paths of the machine that built Python.

  Args:
    folder: Where to look; None means where this Python keeps it.

  Returns:
    (relative path with forward slashes, bytes), sorted by path.

  Raises:
    UserError: This Python came without its source.
  """
  if folder is None:
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
  documents = []
  try:
    names = sorted(_walk(folder, _STDLIB_SKIPPED_FOLDERS.__contains__))
  except OSError:
    names = []
  for name in names:
    base = name.rpartition("/")[2]
    if not base.endswith(".py") or base.startswith("_sysconfigdata"):
      continue
    try:
      raw = (folder / name).read_bytes()
      check_text(raw)
    except (NotTextError, OSError):
      continue
    if raw.strip():
      documents.append((name, raw))
  if not documents:
    raise UserError(
      "`data` was not given, and this Python came without the source of its "
      f"standard library (none in {str(folder)!r}); give a text file or "
      "folder as `data`."
    )
  return documents


def _walk(
  folder: pathlib.Path, is_skipped: Callable[[str], bool]
) -> Iterator[str]:
  """Relative paths of the regular files below `folder`, in any order."""

  def fail(error: OSError) -> None:
    raise error

  for root, folders, files in os.walk(folder, onerror=fail):
    folders[:] = [name for name in folders if not is_skipped(name)]
    for name in files:
      path = pathlib.Path(root, name)
      if not is_skipped(name) and path.is_file():
        yield path.relative_to(folder).as_posix()


@contextlib.contextmanager
def _user_errors(path: pathlib.Path) -> Iterator[None]:
  """Turns what the operating system says about `path` into a `UserError`."""
  try:
    yield
  except FileNotFoundError:
    raise UserError(
      '`data` must be a file or folder of UTF-8 text, or "hf:NAME", but '
      f"{str(path)!r} does not exist."
    ) from None
  except PermissionError as error:
    raise UserError(
      f"`data`: {str(error.filename or path)!r} may not be read: permission "
      "denied; check its owner and mode."
    ) from None
  except OSError as error:
    reason = error.strerror or type(error).__name__
    raise UserError(
      f"`data`: {str(error.filename or path)!r} cannot be read: {reason}."
    ) from None
