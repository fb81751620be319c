"""The routes under /api, one module per subject."""
