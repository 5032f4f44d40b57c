"""KV memory as the host sees it: which block belongs to which request."""
