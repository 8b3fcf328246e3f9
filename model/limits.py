"""Limits on untrusted files. A file beyond one raises an error that names it."""

MAX_FILE_BYTES = 256 << 20
"""Bytes of an image file, or of a file in an archive after decompression."""

MAX_RECORD_BYTES = 16 << 20
"""Bytes of one record of annotations."""

MAX_IMAGE_SIDE = 1 << 17
"""Pixels along a side of an image. Resizing stores every row at the encoder's width: memory grows with the height."""

MAX_ENCODER_SIDE = 4096
"""Pixels along a side of an encoder's input, and of the resized image that it is cropped from."""
