"""Headers of every answer."""

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
"""The page takes nothing from elsewhere, and nobody else may show it, embed it or read it."""

NOT_KEPT = "no-store"
"""Cache-Control of the API's answers, but for pictures, which say their own."""
ASKED_AGAIN = "no-cache"
"""Cache-Control of the page's files: kept, and looked at again each time."""
