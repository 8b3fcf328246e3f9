"""Limits on files that others made. A file beyond one is refused by an error that names it."""

MAX_FILE_BYTES = 256 << 20
"""Bytes of an image file or of a file in an archive, as they are once inflated."""

MAX_RECORD_BYTES = 16 << 20
"""Bytes of one record of annotations."""

MAX_IMAGE_SIDE = 1 << 17
"""Pixels along a side of an image. Resizing holds every row at the encoder's width, so memory grows with the height."""

MAX_ENCODER_SIDE = 4096
"""Pixels along a side of an image as an encoder sees it, and as it is resized to before."""
