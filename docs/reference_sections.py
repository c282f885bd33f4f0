"""The docstrings' section `Example:` is what Griffe calls `Examples:`; it would show a bare one as a quotation."""

import re

import griffe


class Sections(griffe.Extension):
    """Names the section as Griffe does, before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Called with each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
