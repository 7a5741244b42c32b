"""From files to packed rows: documents (text, tokens), then batches that can be resumed at any point."""
