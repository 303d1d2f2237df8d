"""The request path, top to bottom. Start at `llm_engine.LLMEngine.add_request` and `LLMEngine.step`."""
