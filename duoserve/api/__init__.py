"""An OpenAI-compatible server over one service."""
