from __future__ import annotations

from extras import need

need("gradio", "matplotlib")
