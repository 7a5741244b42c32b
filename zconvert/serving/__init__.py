"""The engine in use: plans that follow the machine and the text, an OpenAI-compatible endpoint, files of prompts."""
