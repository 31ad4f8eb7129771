"""Machines by name: profiles that come with the program, beside files that `doctor` or anybody wrote. Knows where they lie;
measures nothing.
"""

from __future__ import annotations

from pathlib import Path

from duoserve.core import Refusal, nearest
from duoserve.profile import Profile, read_profile

FOLDER = Path(__file__).parent / "machines"
HERE = "here"  # what `doctor` measured


def machines() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def machine(name: str) -> Profile:
    """A machine of the fleet, or a profile's file."""
    if name in machines():
        return read_profile(FOLDER / f"{name}.json")
    path = Path(name)
    if path.suffix == ".json" or path.exists():
        return read_profile(path)
    raise Refusal("E_PROFILE", f"no machine is known by the name {name!r}", nearest(name, [*machines(), HERE]), 3)
