"""HTML pages that contain everything they show and make no request: one style and one script, allowed by their digests.

A room with such pages has its templates, its style and its script in its own folder `templates/`. All pages begin with
the style `base.css` beside this file: colours for light and dark, type, tables and controls.
"""

import base64
import hashlib
import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from spinejax.errors import needs


def templates(package: str, need: str):
    """A package's Jinja environment: it escapes what is inserted, and refuses undefined names.

    Args:
        package: dotted name of the package with the folder `templates/`.
        need: what needs Jinja2, for the message.

    Raises:
        NotInstalledError: Jinja2 is missing.
    """
    with needs(need, "report"):
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def style_and_script(folder: Path, name: str, *before: str, loads: bool = False, bundle: str = "") -> dict[str, str]:
    """A page's `style` (`base.css`, then `<name>.css`), its `script`, and the `policy` for both.

    The script is `<name>.js`, behind those of the names `before`, which may have styles too, and behind the text of a
    `bundle`. The content policy allows this one style, this one script and pictures inside the page, and nothing else;
    with `loads`, also scripts that this script itself adds, from beside the page.
    """
    style = (Path(__file__).parent / "base.css").read_text(encoding="utf-8")
    styles = (folder / f"{part}.css" for part in (*before, name))
    style += "\n".join(path.read_text(encoding="utf-8") for path in styles if path.is_file())
    scripts = ((folder / f"{part}.js").read_text(encoding="utf-8") for part in (*before, name))
    script = "\n".join([*filter(None, [bundle]), *scripts])
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'"
    policy += " 'strict-dynamic'; " if loads else "; "
    return {"style": style, "script": script, "policy": policy + "img-src data:; base-uri 'none'; form-action 'none'"}


def grey_pixels(picture: str) -> UInt8[np.ndarray, "H W"]:
    """The pixels of a picture that `webp` made."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        return np.asarray(image.convert("L"))


def webp(pixels: UInt8[np.ndarray, "H W"], quality: int) -> str:
    """A grey picture as a WebP file in base64; `quality` is from 0 to 100."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file, "WEBP", quality=quality, method=0
    )  # a third of the time of 4, a third more bytes
    return base64.b64encode(file.getvalue()).decode()
