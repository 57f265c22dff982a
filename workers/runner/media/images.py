"""Are these bytes an image, and which one? Decoded by pillow, which is imported only where a row may bring one."""

import io

from PIL import Image, UnidentifiedImageError

from workers.runner.prompts import RowRefused

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_PIXELS = 64 * 1024**2


def decode_image(data: bytes) -> Image.Image:
    """The image in RGB, of an animation the first picture. Raises RowRefused for bytes that are none, and for a huge one.

    The size is read before anything is unpacked: few bytes can claim any number of pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise _too_large()
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise _too_large() from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise RowRefused(
            "invalid_content", f"An image cannot be decoded; send a whole file of one of these kinds: {', '.join(FORMATS)}."
        ) from error


def _too_large() -> RowRefused:
    return RowRefused("content_too_large", f"An image has more than {MOST_PIXELS:,} pixels; scale it down.")
