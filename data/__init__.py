"""Text in, token ids out: corpora, tokenizers, packed tokens and batches."""
