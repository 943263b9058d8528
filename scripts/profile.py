#!/usr/bin/env python3
"""`ddit-rt profile` at the path where a visitor with a GPU looks for it.

A script's folder comes first on the path, and torch imports the standard library's `profile`: so
whoever imports this file by that name gets the standard library's module.
"""

import importlib.util
import os
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("profile", Path(os.__file__).with_name("profile.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
_STANDARD = importlib.util.module_from_spec(_SPEC)
sys.modules["profile"] = _STANDARD
_SPEC.loader.exec_module(_STANDARD)

if __name__ == "__main__":
    from ddit_rt.cli import main

    sys.exit(main(["profile", *sys.argv[1:]]))
