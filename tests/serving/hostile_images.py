"""Images that no decoder should be talked into: bombs, lies about sizes, cut-off and damaged files."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, content: bytes, *, checksum: int | None = None) -> bytes:
    """One chunk of a PNG file."""
    found = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", found)


def header(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    """The chunk that says how large a PNG file is."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))


def bomb(width: int, height: int) -> bytes:
    """A whole, valid PNG file of black pixels, 1 bit each: a thousandth of what it becomes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return SIGNATURE + header(width, height, 1, 0) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def claimed_jpeg(width: int, height: int) -> bytes:
    """A small JPEG file whose frame header says another size."""
    content = bytearray(saved("JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def saved(format: str, side: int = 16, mode: str = "RGB") -> bytes:
    """A good file."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def hostile_images() -> Iterator[tuple[str, bytes]]:
    """(What it is, its bytes)."""
    small, end = header(16, 16), chunk(b"IEND", b"")
    rows = zlib.compress(bytes(16 * 49))
    good = {"PNG": saved("PNG"), "JPEG": saved("JPEG")}
    yield "nothing", b""
    yield "a PNG claiming 50,000 x 50,000", SIGNATURE + header(50_000, 50_000) + chunk(b"IDAT", rows) + end
    yield "a PNG claiming 2^31 - 1 squared", SIGNATURE + header(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", rows) + end
    yield "a PNG of no height", SIGNATURE + header(16, 0) + chunk(b"IDAT", rows) + end
    yield "a JPEG claiming 50,000 x 50,000", claimed_jpeg(50_000, 50_000)
    yield "a JPEG of no height", claimed_jpeg(16, 0)
    yield "a PNG that becomes 400 megapixels", bomb(20_000, 20_000)
    for kind in (b"iCCP", b"zTXt"):
        text = b"x\0\0" + zlib.compress(bytes(50_000_000), 9)
        yield f"a PNG whose {kind!r} becomes 50 MB", SIGNATURE + small + chunk(kind, text)
    text = b"x\0\1\0\0\0" + zlib.compress(bytes(50_000_000), 9)
    yield "a PNG whose iTXt becomes 50 MB", SIGNATURE + small + chunk(b"iTXt", text)
    yield "a chunk of 2^32 - 1 bytes", SIGNATURE + small + b"\xff\xff\xff\xffIDAT" + rows
    yield "a wrong checksum", SIGNATURE + small + chunk(b"IDAT", rows, checksum=0) + end
    yield "a palette that is missing", SIGNATURE + header(16, 16, 8, 3) + chunk(b"IDAT", rows) + end
    yield "rows that are no zlib stream", SIGNATURE + small + chunk(b"IDAT", b"nonsense" * 9) + end
    for format, content in good.items():
        for share in range(1, 12):
            yield f"{share} twelfths of a {format}", content[: len(content) * share // 12]
        yield f"the head of a {format}, then noise", content[:24] + np.random.default_rng(1).bytes(5000)
        yield f"a {format} behind a zero byte", b"\0" + content
    for format in ("GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"):
        yield f"a {format}", saved(format)
    yield "an SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "a PostScript file", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    yield "a zip archive", zipped(b"0" * 1_000_000)
    yield "a gzip stream", b"\x1f\x8b\x08" + bytes(200)
    yield "an HTML page", b"<!doctype html><script>alert(1)</script>"


def zipped(content: bytes) -> bytes:
    """A zip archive with a member outside of it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../etc/cron.d/x", content)
    return file.getvalue()
