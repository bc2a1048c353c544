"""Pictures: from an archive that a stranger sent to upright sRGB pictures of a few sizes.

In: a zip or tar. Out: `Photo`s with captions and masks, warnings about them, and cropped pictures for the encoder. Read
`archive` (unpacks, with `entries` and `names`), `photos` (which file is what, with `captions`), `survey` (a first look
at all) and `buckets` (decode, with `colours`; scale, crop) in this order. Standard library and Pillow only, no torch.
"""
