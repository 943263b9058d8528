"""`python -m ddit_rt.cli` is `ddit-rt`."""

import sys

from ddit_rt.cli.main import main

sys.exit(main())
