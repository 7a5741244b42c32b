"""Text from a checkpoint for others: an OpenAI-compatible endpoint, and files of prompts."""
