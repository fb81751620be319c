"""Headers of every response."""

SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
"""The page loads nothing from other origins, and no other origin may embed or read it."""

NO_STORE = "no-store"
"""Cache-Control of the API's responses, except images, which set their own."""
REVALIDATE = "no-cache"
"""Cache-Control of the page's files: cached, and revalidated at each use."""
