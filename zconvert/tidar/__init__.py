"""The method at run time. Shipped verbatim inside every exported checkpoint: torch, transformers and siblings only."""
