"""Installs the top-level folders as `strop.<folder>`."""

from setuptools import find_packages, setup

ROOMS = ("engine", "kernels", "launch")
packages = [f"strop.{name}" for room in ROOMS for name in (room, *(f"{room}.{p}" for p in find_packages(room)))]
setup(packages=packages, package_dir={f"strop.{room}": room for room in ROOMS})
