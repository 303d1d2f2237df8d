"""The dashboard: a page at `/`, its files, and the feed it draws from."""
