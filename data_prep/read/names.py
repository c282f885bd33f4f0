"""Names of files, folders and patients in one form, however a file system or an archive encoded them."""

import unicodedata


def canonical(name: str) -> str:
    r"""A name in Unicode's composed form (NFC), as typed in label tables.

    Archives made on macOS hold decomposed names (`u` and a diaeresis). Those made on Windows may hold names in Latin-1,
    which are no UTF-8: Python stands each such byte for a surrogate.

    Example:
        >>> canonical("Mu\u0308ller_t2") == canonical("M\udcfcller_t2") == "Müller_t2"
        True
    """
    encoded = name.encode("utf-8", "surrogateescape")
    try:
        name = encoded.decode()
    except UnicodeDecodeError:
        name = encoded.decode("latin-1")
    return unicodedata.normalize("NFC", name)
