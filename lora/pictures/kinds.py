"""What a file is, by its first bytes: pictures, and what users send in place of them."""

import re

HEAD = 64
"""Bytes that `kind` wants to see."""

PICTURES = frozenset({"JPEG", "PNG", "WebP", "GIF", "HEIC", "AVIF", "TIFF", "BMP"})
"""The kinds that `buckets.read_picture` reads."""
CERTAIN = PICTURES - {"TIFF", "BMP"}
"""Those that are nothing else: raw files of cameras begin as a TIFF does, and any text may begin with BM."""

_SIGNATURES = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n", "PNG"),
    (rb"GIF8[79]a", "GIF"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"RIFF....AVI ", "film"),
    (rb"....ftypavi[fs]", "AVIF"),
    (rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|mif2|msf1)", "HEIC"),
    (rb"....ftypcrx ", "raw picture of a camera"),
    (rb"....(ftyp|moov|mdat)|\x1a\x45\xdf\xa3|\x00\x00\x01\xba|FLV\x01", "film"),
    (rb"II\*\x00|MM\x00\*", "TIFF"),
    (rb"BM....\x00\x00\x00\x00", "BMP"),
    (rb"PK\x03\x04|PK\x05\x06", "zip archive"),
    (rb"Rar!\x1a", "RAR archive"),
    (rb"7z\xbc\xaf\x27\x1c", "7z archive"),
    (rb"\x1f\x8b\x08", "gzip archive"),
    (rb"BZh[1-9]1AY", "bzip2 archive"),
    (rb"\xfd7zXZ", "xz archive"),
    (rb"\x28\xb5\x2f\xfd", "zstd archive"),
    (rb"%PDF", "PDF"),
    (rb"\{\\rtf", "RTF document"),
    (rb"8BPS", "Photoshop document"),
    (rb"\xd0\xcf\x11\xe0", "Office document"),
)
"""Regular expressions of a file's beginning, the first that fits counts. Of a film or a HEIC the brand follows `ftyp`
(ISO/IEC 14496-12, 4.3)."""


def kind(head: bytes) -> str:
    """The kind of a file that begins so, as a noun for a message, or "" where it is unknown."""
    return next((name for signature, name in _SIGNATURES if re.match(signature, head, re.DOTALL)), "")
