"""From a template and what it shows to a page: one file that runs no script but its own and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

import picardopt

_TEMPLATES = Path(__file__).with_name("templates")


@cache
def _environment() -> jinja2.Environment:
    """Returns what fills templates: every text is escaped, and a name that is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(template: str, scripts: Sequence[str], **content: Any) -> str:
    """Returns a page as HTML.

    Its content security policy names the page's own script by its hash: a browser runs no other one, whatever a text
    of the content holds, and sends no request.

    Args:
        template: File name of the template.
        scripts: File names of what its script consists of, in order.
        content: What the template names; texts are escaped.
    """
    script = "\n".join((_TEMPLATES / name).read_text() for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template(template)
        .render(
            **content,
            policy=policy,
            script=script,
            style=(_TEMPLATES / "page.css").read_text(),
            version=picardopt.__version__,
        )
    )
