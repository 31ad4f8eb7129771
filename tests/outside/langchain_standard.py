"""langchain's own integration tests of chat models, unmodified, against a server of ours at DUOSERVE_URL. Run by pytest
where langchain-openai and langchain-tests are; collected by name only, so that our own suite passes it over.
"""

from __future__ import annotations

import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

SETTINGS = {"temperature": 0, "max_tokens": 300, "stream_usage": True}


class TestServed(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        url = f"{os.environ['DUOSERVE_URL']}/v1"
        return {"model": "demo", "base_url": url, "api_key": "none", "max_retries": 0} | SETTINGS

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {}

    @property
    def supports_json_mode(self) -> bool:
        return True
