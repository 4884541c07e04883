import re
from pathlib import Path

from setuptools import setup

# kernels/ and trainer/ sit beside fastkl/ in the repository and inside it once installed: neither name may ever become a
# top-level package (`kernels` is also a Hugging Face distribution). The symlinks in fastkl/ say the same to every tool
# that reads the source tree.
ROOMS = {str(file.parent) for room in ("kernels", "trainer") for file in Path(room).rglob("*.py")}
ROOMS |= {str(file.parent.relative_to("fastkl")) for file in Path("fastkl").rglob("*/*.py")}  # no symlink is followed
# An index shows README.md beside no files: its links lead to the repository there.
(REPOSITORY,) = re.findall(r'^Repository = "(.+)"', Path("pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
README = re.sub(
    r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)",
    lambda link: f"{link[1]}[{link[2]}]({REPOSITORY}/{'raw' if link[1] else 'blob'}/main/{link[3]})",
    Path("README.md").read_text(encoding="utf-8"),
)
setup(
    long_description=README,
    long_description_content_type="text/markdown",
    packages=["fastkl", *(f"fastkl.{room.replace('/', '.')}" for room in sorted(ROOMS))],
    package_dir={"fastkl": "fastkl", "fastkl.kernels": "kernels", "fastkl.trainer": "trainer"},
    package_data={"fastkl": ["py.typed"], "fastkl.trainer.runs.report": ["html/*"]},
)
