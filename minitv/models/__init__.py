"""Models: embedding, blocks and head put together."""
