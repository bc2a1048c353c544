"""Pictures: from an archive that a stranger sent to upright sRGB pictures of a few sizes.

In: a zip or tar. Out: `Photo`s with their captions, warnings about them, and cropped pictures for the encoder.
Read `archive` (unpacks within limits), `photos` (which caption belongs to which picture), `survey` (a first look at
all of them) and `buckets` (decode, choose a size, scale, crop) in this order: it is the order of the data.
Standard library and Pillow only: torch is never loaded here.
"""
