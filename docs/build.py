"""Build the documentation as a site: `make docs`, or `python docs/build.py`. A broken link is an error.

Links in the documents are relative to the file, for readers of the repository. The site has the pages of docs/, and
MODEL_ZOO.md and CONTRIBUTING.md from the root. A link to a file that is not a page of the site becomes text.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
FROM_ROOT = ("MODEL_ZOO.md", "CONTRIBUTING.md")
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def page_source(page: Path) -> str:
    """The Markdown of a page, with links for the site.

    Raises:
        FileNotFoundError: a link names a file that is not in the repository.
    """

    def of_site(match: re.Match) -> str:
        text, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        path = (page.parent / target).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{page.relative_to(ROOT)} links to {target}, which does not exist")
        if path.parent == ROOT and path.name in FROM_ROOT:
            return f"[{text}]({path.name}{anchor})"
        if path.is_relative_to(DOCS) and path.suffix in (".md", ".svg", ".png"):
            return f"[{text}]({path.relative_to(DOCS).as_posix()}{anchor})"
        return text

    return LINK.sub(of_site, page.read_text(encoding="utf-8"))


def assemble(folder: Path) -> None:
    """Write the source pages of the site into a folder."""
    shutil.copytree(DOCS / "images", folder / "images")
    for page in [*DOCS.glob("*.md"), *(ROOT / name for name in FROM_ROOT)]:
        (folder / page.name).write_text(page_source(page), encoding="utf-8")


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        project = Path(temporary).resolve()
        sources = project / "docs"
        sources.mkdir()
        assemble(sources)
        config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        config = config.replace("projects/", f"{ROOT}/projects/")
        (project / "mkdocs.yml").write_text(config, encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--clean",
            "--strict",
            "--quiet",
            "-f",
            str(project / "mkdocs.yml"),
        ]
        # The theme prints an advertisement for its successor at every build.
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        status = subprocess.run(command, cwd=project, env=environment).returncode
        if status == 0:
            shutil.rmtree(ROOT / "output/site", ignore_errors=True)
            shutil.copytree(project / "output/site", ROOT / "output/site")
    if status == 0:
        print(f"site: {ROOT / 'output/site/index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
