"""Detection of file formats by their first bytes, for error messages about unexpected files."""

import re
import zlib
from pathlib import Path

HEAD = 4096
"""Number of bytes read from a file."""
GZIP = b"\x1f\x8b"
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAGIC = (  # no text or safetensors file starts with one of these
    (b"\xfd7zXZ\x00", "an .xz archive; unpack it with `xz -d`"),
    (b"\x28\xb5\x2f\xfd", "a .zst archive; unpack it with `zstd -d`"),
    (b"7z\xbc\xaf\x27\x1c", "a .7z archive; unpack it"),
    (b"Rar!\x1a\x07", "a .rar archive; unpack it"),
    (b"\x04\x22\x4d\x18", "an .lz4 archive; unpack it with `lz4 -d`"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel or Word file; save it as CSV"),
    (b"SQLite format 3\x00", "an SQLite database; export its table as CSV"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file; write its table as parquet"),
    (b"\x93NUMPY", "a NumPy array; write it as JSON lines"),
    (b"ARROW1\x00\x00", "an Arrow file; write it as parquet, or load its folder as kind: datasets"),
    (b"\xff\xff\xff\xff", "an Arrow stream; load its folder as kind: datasets"),
    (b"Obj\x01", "an Avro file; write it as parquet"),
    (b"%PDF-", "a PDF file"),
    (b"\x89PNG\r\n", "a picture"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_PAGE = re.compile(rb"\s*<(!doctype html|html|\?xml)\b", re.IGNORECASE)


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file, decompressed if it is a gzip file."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head.startswith(GZIP):
        return head
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD)
    except zlib.error:  # reported when the file is read
        return b""


def stand_in(head: bytes) -> str | None:
    """Return the name of a common stand-in for a data file: an LFS pointer, a web page, an archive; else None."""
    if head.startswith(_POINTER):
        return "a Git LFS pointer, not the file itself; get the file with `git lfs pull`"
    if _PAGE.match(head):
        return "a web page or XML; was it downloaded from the right address?"
    if head.startswith(b"PK\x03\x04"):
        if b"[Content_Types].xml" in head or b"xl/" in head:
            return "an Excel file; save it as CSV"
        return "a zip archive; unpack it"
    if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", head):
        return "a .bz2 archive; unpack it with `bzip2 -d`"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    return next((name for magic, name in _MAGIC if head.startswith(magic)), None)


def not_text(head: bytes) -> str | None:
    """Return the format of a file that is not text, if it is a known one."""
    if (found := stand_in(head)) is not None:
        return found
    if _is_binary(head) and head.startswith(b"PAR1"):
        return "a parquet file; set kind: parquet"
    if head.startswith(b"GGUF") and _is_binary(head):
        return "a gguf model"
    if head.startswith(b"ORC") and _is_binary(head):
        return "an ORC file; write it as parquet"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _is_wide(head):
        return "text in UTF-16 or UTF-32; save it as UTF-8"
    if _PICKLE.match(head):
        return "a pickle, which is never loaded; write its rows as JSON lines"
    return None


def _is_binary(head: bytes) -> bool:
    return any(byte < 9 or 13 < byte < 27 for byte in head)


def _is_wide(head: bytes) -> bool:
    """Return whether every other byte is zero, as in ASCII text encoded as UTF-16 or UTF-32."""
    return len(head) > 3 and max(head[start::2].count(0) for start in (0, 1)) > 0.45 * len(head)
