"""Name the image formats and the file suffixes that are read: all raster formats of this Pillow but a few."""

from __future__ import annotations

import functools

from PIL import Image

FIRST = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # the formats that are tried first
# Formats that Pillow registers and that are not read: EPS runs Ghostscript, and IPTC opens any other format, so EPS
# too; WMF draws on Windows only; BUFR, GRIB, HDF5 and MPEG have no decoder; FITS holds measurements, maybe compressed.
LEFT_OUT = frozenset(("EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FITS"))
OPENED_AS = {"MPO": "JPEG"}  # formats with suffixes that the reader of another format opens
ALWAYS = {".avif": "AVIF", ".avifs": "AVIF"}  # also of a Pillow that cannot read them, whose message then says so
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"hevc": "HEIC"}
REMEDIES = {"AVIF": "pip install --upgrade pillow, or save it as PNG", "HEIC": "save it as JPEG"}


@functools.cache
def signed_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats whose files begin with a signature, the common ones first."""
    return tuple(name for name in _formats() if Image.OPEN[name][1] is not None)


@functools.cache
def unsigned_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats without a signature, such as TGA: many other files could pass for them."""
    return tuple(name for name in _formats() if Image.OPEN[name][1] is None)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of image files, in small letters and with the dot."""
    names = {*_formats()}
    registered = {**Image.registered_extensions(), **ALWAYS}
    return frozenset(
        suffix for suffix, name in registered.items() if OPENED_AS.get(name, name) in names or suffix in ALWAYS
    )


def unread_format(content: bytes) -> str | None:
    """Return the name and the remedy of an image format that this Pillow does not read; None for other content."""
    brand = BRANDS.get(content[8:12]) if content[4:8] == b"ftyp" else None
    name = None if brand in Image.OPEN else brand
    beginning = content[:16].ljust(16, b"\0")
    for known in signed_formats():
        accept = Image.OPEN[known][1]
        if accept is not None and isinstance(accept(beginning), str):  # the reason why this Pillow cannot read it
            name = known
    if name is None:
        return None
    return f"{name}, which this Pillow was built without; {REMEDIES.get(name, REMEDIES['AVIF'])}"


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return Pillow's names of all formats that are read, the common ones first."""
    Image.init()
    others = [name for name in Image.ID if name not in LEFT_OUT and name not in FIRST]
    return (*(name for name in FIRST if name in Image.OPEN), *others)
