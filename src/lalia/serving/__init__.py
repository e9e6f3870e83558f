"""HTTP: the OpenAI-compatible API and the chat page, around one engine."""
