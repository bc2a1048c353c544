"""Every limit on what a user may send. Sizes are in bytes and are enforced while reading."""

MAX_FILES = 2_000
"""Files in one archive, junk not counted."""
MAX_ENTRIES = 20_000
"""Entries of any kind in one archive: files, folders, junk, headers."""
MAX_BYTES = 4 * 2**30
"""All files together, unpacked."""
MAX_RATIO = 100
"""Bytes out for each byte in, for an entry larger than RATIO_FROM."""
RATIO_FROM = 10 * 2**20
MAX_NAME_BYTES = 1_000
"""One name with its folders, in UTF-8."""
MAX_PIXELS = 100_000_000
"""One picture, as it is decoded; `buckets.py` enforces it."""
MAX_JPEG_PIXELS = 256_000_000
"""A JPEG, which is decoded at a half, a quarter or an eighth: phones have cameras of 108 and 200 megapixels."""
MAX_CAPTION_BYTES = 10_000
"""One caption; `captions.py` enforces it."""
MAX_TABLE_BYTES = 8 * 2**20
"""One table of captions; `captions.py` enforces it."""
