from __future__ import annotations

from extras import need

need("ray", "pandas", "pyarrow")
