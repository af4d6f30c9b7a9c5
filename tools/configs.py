"""Configs of bundles from templates, so that what several bundles share stands in one place."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "tools" / "templates"
BUNDLES = ROOT / "bundles"


def rendered() -> dict[Path, str]:
    """Each config that has a template, and its text.

    ``tools/templates/<bundle>/<file>`` gives ``bundles/<bundle>/configs/<file>``; the other folders hold what these
    extend.
    """
    environment = Environment(  # YAML: nothing is escaped
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found = sorted(path for path in TEMPLATES.glob("*/*.yaml") if (BUNDLES / path.parent.name / "configs").is_dir())
    return {
        BUNDLES / path.parent.name / "configs" / path.name: environment.get_template(
            path.relative_to(TEMPLATES).as_posix()
        ).render(bundle=path.parent.name)
        for path in found
    }


def configs() -> None:
    """Write the configs of all bundles that have templates; run it after a change of a template."""
    for path, text in rendered().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
