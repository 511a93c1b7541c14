"""Builds the package from settings.ini, which nbdev reads too: one place for name, version and requirements."""
from configparser import ConfigParser
from pathlib import Path
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
CFG = ConfigParser(delimiters=["="])
CFG.read(HERE / "settings.ini", encoding="utf-8")
CFG = CFG["DEFAULT"]

# What an installed wheel needs of the checkout, and where it lies inside the package (see bcos_nb.resources).
PACKAGE_DATA = {
    "data/paper": "*.csv",
    "data/bench": "*.csv",
    "data/examples": "*.*",
    "data/presets": "*.yaml",
    "data/presets/grids": "*.yaml",
    "data/presets/detectors/study": "*.yaml",
    "data/presets/detectors/ours": "*.yaml",
    "data/presets/search": "*.yaml",
    "data/presets/cluster": "*.*",
    "nbs/experiments": "*.ipynb",
    "nbs/explore": "*.ipynb",
}


class BuildWithResources(build_py):
    """Copies the presets, the study's tables and the notebooks that people run into the wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for folder, pattern in PACKAGE_DATA.items():
            target = Path(self.build_lib) / CFG["lib_path"] / "_resources" / folder
            target.mkdir(parents=True, exist_ok=True)
            for source in sorted((HERE / folder).glob(pattern)):
                shutil.copy2(source, target / source.name)


setup(
    name=CFG["lib_name"],
    version=CFG["version"],
    description=CFG["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=CFG["author"],
    author_email=CFG["author_email"],
    url=CFG["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=CFG["keywords"],
    packages=find_packages(include=[CFG["lib_path"], CFG["lib_path"] + ".*"]),
    package_data={CFG["lib_path"]: ["**/*.js", "**/*.css"]},
    include_package_data=False,
    python_requires=">=" + CFG["min_python"],
    install_requires=CFG["requirements"].split(),
    extras_require={extra: CFG[f"{extra}_requirements"].split() for extra in ("dev", "cluster", "faces", "lmdb", "trackers", "postgres")},
    entry_points={"console_scripts": CFG["console_scripts"].split()},
    cmdclass={"build_py": BuildWithResources},
    zip_safe=False,
)
