"""The routes under /api, a module a subject."""
