from __future__ import annotations

from extras import need

need("fastapi", "httpx", "openai", "prometheus_client", "uvicorn")
