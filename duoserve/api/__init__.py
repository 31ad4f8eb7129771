"""The HTTP side: OpenAI's API on a `duoserve.service.Service`. Knows requests, replies and sockets; knows no experts."""
