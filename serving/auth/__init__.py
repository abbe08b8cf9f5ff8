"""Who calls: API keys from a file, and the tenants they stand for."""
