"""Engines of the shared artifact."""

from engine_fixtures import engine, own_backend, own_home, pipeline

__all__ = ["engine", "own_backend", "own_home", "pipeline"]
