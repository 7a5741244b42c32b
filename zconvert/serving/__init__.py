"""The engine in use: plans that follow the machine and the text."""
