"""An HTTP server in front of one engine, with OpenAI's interface."""
