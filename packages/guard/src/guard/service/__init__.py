"""The guard behind HTTP: moderation, chat completions and streams in the OpenAI shapes."""

from guard.service.app import create_app
from guard.service.settings import Limits, Settings

__all__ = ["Limits", "Settings", "create_app"]
